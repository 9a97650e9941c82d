//! Installed as an administrator would, on a whole host of its own: the package, the units, users and groups, the journal, a
//! reboot, an upgrade, a removal. All of it is done over ssh, and with nothing but the packages.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use agentd_tests::lab::{Domain, GuestImage, Host, target_folder, wait_until};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// How long anything may take there: two emulated processors do it all.
const LIMIT: Duration = Duration::from_secs(180);
/// Who asks in these tests, and the groups that they are in.
const USERS: [(&str, &str); 6] = [
    ("member", "agentd,ops"),
    ("matched", "agentd"),
    ("labelled", "agentd"),
    ("idle", "agentd"),
    ("leaver", "agentd,ops"),
    ("stranger", ""),
];
/// The config's end in place of the packaged one's.
const ACCESS: &str = r#"
[[access]]
group = "ops"
allow = ["read", "resize", "power"]
match = "*"
[[access]]
user = "matched"
allow = ["read", "resize"]
match = "container/db*"
[[access]]
user = "labelled"
allow = ["read"]
match = "label:tier=test"
"#;

/// A package that was built: `make deb`, `make rpm`.
fn package(extension: &str) -> Result<PathBuf> {
    let built = fs::read_dir(target_folder()?.join("packages")).context("no packages: run `make deb rpm`")?;
    let built = built.filter_map(|entry| Some(entry.ok()?.path()));
    let mut found = built.filter(|path| path.extension().is_some_and(|found| found == extension));
    let package = found.next().with_context(|| format!("no .{extension}: run `make deb rpm`"))?;
    ensure!(found.next().is_none(), "more than one .{extension}: run `make deb rpm`");
    Ok(package)
}

/// A host with the package on it, and nothing else done.
fn installed() -> Result<Host> {
    let host = Host::boot()?;
    host.put(&package("deb")?, "/root/agentd.deb")?;
    host.ssh("root", "apt-get install -y ./agentd.deb 2>&1")?;
    up(&host)?;
    Ok(host)
}

/// Waits until agentd and both engines are well.
fn up(host: &Host) -> Result<()> {
    wait_until("agentd and both engines to be well", LIMIT, || {
        Ok((exit(host, "root", "ctl health -q")? == 0).then_some(()))
    })
    .with_context(|| {
        host.try_ssh("root", "ctl health; journalctl -u agentd --no-pager -n 20").map(printed).unwrap_or_default()
    })
}

/// Puts a real VM and real containers on the host: `vm/web`, and `db` and `cache`, the second with a label.
fn populate(host: &Host) -> Result<()> {
    let image = GuestImage::get()?;
    let there = GuestImage {
        kernel: "/var/lib/libvirt/images/vmlinuz".into(),
        initrd: "/var/lib/libvirt/images/initrd".into(),
    };
    host.put(&image.kernel, &there.kernel.to_string_lossy())?;
    host.put(&image.initrd, &there.initrd.to_string_lossy())?;
    let xml = tempfile::NamedTempFile::new()?;
    fs::write(xml.path(), Domain::new("web").vcpus(1, 8).memory(256, 256).xml(&there))?;
    host.put(xml.path(), "/root/web.xml")?;
    host.ssh("root", "virsh -q define web.xml && virsh -q start web")?;
    host.ssh(
        "root",
        "mkdir -p /tmp/busybox/bin && cp /bin/busybox /tmp/busybox/bin && ln -s busybox /tmp/busybox/bin/sleep && \
         tar -C /tmp/busybox -c . | docker import - lab",
    )?;
    for (name, more) in [("db", ""), ("cache", "--label tier=test")] {
        // As process 1 of a container, sleep hears nothing gentler.
        let limits = "--stop-signal KILL --cpu-period 100000 --cpu-quota 50000 -m 64m --memory-swap 64m";
        host.ssh("root", &format!("docker run -d --name {name} {limits} {more} lab /bin/sleep 1000000"))?;
    }
    Ok(())
}

/// Waits until the guest's own system runs: an emulated one on an emulated host takes its time.
fn guest_is_up(host: &Host) -> Result<()> {
    wait_until("the guest to be up", LIMIT * 2, || {
        Ok(host.ssh("root", "tail -n 1 /var/log/libvirt/qemu/web-console.log")?.contains("STAT").then_some(()))
    })
}

/// More of everything than an emulated host of two processors has.
fn roomy(host: &Host) -> Result<()> {
    let sed = r#"sed -i '/^\[capacity\]/a cpus = 16\nmemory = "16GiB"' /etc/agentd/agentd.toml"#;
    host.ssh("root", &format!("{sed} && ctl check-config && systemctl reload agentd")).map(drop)
}

fn printed(output: std::process::Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The exit code of a line of shell.
fn exit(host: &Host, user: &str, line: &str) -> Result<i32> {
    host.try_ssh(user, line)?.status.code().context("an exit code")
}

/// What a command of ctl says with `-o json`, whatever its exit code.
fn ctl(host: &Host, line: &str) -> Result<Value> {
    let output = host.try_ssh("root", &format!("ctl {line} -o json"))?;
    serde_json::from_slice(&output.stdout).with_context(|| printed(output))
}

/// The cgroup's limit of one container.
fn cpu_max(host: &Host, name: &str) -> Result<String> {
    let id = host.ssh("root", &format!("docker inspect -f '{{{{.Id}}}}' {name}"))?;
    host.ssh("root", &format!("cat /sys/fs/cgroup/system.slice/docker-{id}.scope/cpu.max"))
}

/// What the daemon could do that runs: the score above tells what the unit declares.
fn is_kept_in(host: &Host) -> Result<()> {
    let inside = "pid=$(systemctl show -p MainPID --value agentd)";
    let capabilities = host.ssh("root", &format!("{inside}; grep ^Cap /proc/$pid/status | tr -d '0\\t\\n'"))?;
    ensure!(capabilities == "CapInh:CapPrm:CapEff:CapBnd:CapAmb:", "it has capabilities: {capabilities}");
    let links = host.ssh("root", &format!("{inside}; nsenter -t $pid -n ip -br link | cut -d' ' -f1"))?;
    ensure!(links == "lo", "it has a network: {links}");
    for folder in ["/etc", "/usr", "/root", "/var/lib", "/boot", "/run", "/run/systemd/system", "/dev/shm"] {
        let line = format!("{inside}; nsenter -t $pid -m touch {folder}/of-agentd; test ! -e {folder}/of-agentd");
        let tried = host.try_ssh("root", &line)?;
        ensure!(tried.status.success(), "it could write {folder}: {}", printed(tried));
    }
    host.ssh("root", &format!("{inside}; nsenter -t $pid -m touch /var/lib/agentd/x && rm /var/lib/agentd/x")).map(drop)
}

fn who_may_do_what(host: &Host) -> Result<()> {
    host.ssh("root", "groupadd ops")?;
    for (user, groups) in USERS {
        host.ssh("root", &format!("useradd -m -s /bin/bash {user} && usermod -aG '{groups}' {user}"))?;
    }
    let edit = "sed -i '/^\\[\\[access\\]\\]/,$d' /etc/agentd/agentd.toml && cat >>/etc/agentd/agentd.toml";
    host.ssh("root", &format!("{edit} <<'END'\n{ACCESS}\nEND\nsystemctl reload agentd"))?;
    let both = "resize container/cache --cpus 0.6 --dry-run";
    for (user, line, code) in [
        ("root", "list", 0),
        ("root", both, 0),
        ("root", "history", 0),
        ("root", "clear-hold container/db", 0),
        ("member", "show vm/web", 0),
        ("member", both, 0),
        ("member", "stop container/cache --dry-run", 0),
        ("member", "clear-hold container/db", 5),
        ("matched", "show container/db", 0),
        ("matched", "resize container/db --cpus 0.6 --dry-run", 0),
        ("matched", "stop container/db --dry-run", 5),
        ("matched", "show vm/web", 6),
        ("matched", both, 6),
        ("labelled", "show container/cache", 0),
        ("labelled", both, 5),
        ("labelled", "show container/db", 6),
        ("idle", "list", 5),
        ("idle", "show container/db", 5),
        ("stranger", "list", 5),
    ] {
        let output = host.try_ssh(user, &format!("ctl {line}"))?;
        ensure!(output.status.code() == Some(code), "{user}: ctl {line}: not {code}: {}", printed(output));
    }
    for (user, sees) in [("root", 3), ("member", 3), ("matched", 1), ("labelled", 1)] {
        let list: Value = serde_json::from_str(&host.ssh(user, "ctl list -o json")?)?;
        assert_eq!(list["items"].as_array().map(Vec::len), Some(sees), "{user}: {list}");
    }
    // On one connection, three seconds apart; out of the group in between.
    let asks = "curl -sv --rate 20/m --unix-socket /run/agentd/agentd.sock -o /dev/null -w '%{http_code} %{num_connects}\\n' \
                http://agentd/v1/instances -o /dev/null http://agentd/v1/instances 2>/tmp/curl & \
                sleep 1; gpasswd -d leaver ops >/dev/null; wait; cat /tmp/curl >&2";
    let asks = asks.replacen("curl", "runuser -u leaver -- curl", 1);
    assert_eq!(host.ssh("root", &asks)?, "200 1\n403 0");

    // Who asked, what, by which rule, and how it ended.
    host.ssh("member", "ctl resize container/cache --cpus 0.7")?;
    let told = host.ssh(
        "root",
        "journalctl -u agentd -o json --no-pager AGENTD_INSTANCE=container/cache AGENTD_VERB=resize -n 2",
    )?;
    let told: Vec<Value> = told.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let uid = host.ssh("member", "id -u")?;
    assert_eq!((&told[0]["AGENTD_UID"], &told[1]["AGENTD_UID"]), (&json!(uid), &json!(uid)), "{told:?}");
    ensure!(told[0]["AGENTD_RULE"].as_str().is_some_and(|rule| rule.contains("ops")), "{told:?}");
    assert_eq!(told[0]["AGENTD_OPERATION"], told[1]["AGENTD_OPERATION"]);
    assert_eq!((&told[1]["AGENTD_OUTCOME"], &told[1]["PRIORITY"]), (&json!("changed"), &json!("6")), "{told:?}");
    ensure!(told[1]["MESSAGE"].as_str().is_some_and(|text| text.contains("cpus 0.5 → 0.7")), "{told:?}");
    let refused = host.ssh("root", "journalctl -u agentd -p warning -o cat --no-pager")?;
    ensure!(refused.contains("power of container/db by uid") && refused.contains("not allowed"), "{refused}");
    Ok(())
}

fn the_whole_job(host: &Host) -> Result<()> {
    guest_is_up(host)?;
    host.ssh("member", "ctl resize web --cpus 2 && ctl resize web --memory 200MiB --cpu-limit 1.5 --wait 60s")?;
    wait_until("the guest to say so", LIMIT, || {
        Ok(host.ssh("root", "tail -n 1 /var/log/libvirt/qemu/web-console.log")?.contains("nproc=2").then_some(()))
    })?;
    let quota = "cat /sys/fs/cgroup/machine.slice/machine-qemu*web.scope/libvirt/cpu.max";
    assert_eq!(host.ssh("root", quota)?, "150000 100000");
    host.ssh("member", "ctl resize container/db --cpus 1.5 --memory 128MiB")?;
    assert_eq!(cpu_max(host, "db")?, "150000 100000");
    // What an engine has set stays over systemd's reload, or is told.
    host.ssh("root", "systemctl daemon-reload; sleep 3")?;
    assert_eq!((host.ssh("root", quota)?.as_str(), cpu_max(host, "db")?.as_str()), ("150000 100000", "150000 100000"));
    // By hand: noticed, and on record.
    host.ssh("root", "docker update --cpu-quota 60000 db")?;
    wait_until("drift on record", LIMIT, || {
        let history = ctl(host, "history container/db")?;
        Ok((history["items"][0]["happening"] == "drift").then_some(()))
    })?;
    host.ssh("root", "ctl stop container/db && ctl start container/db && ctl undo vm/web --wait 60s")?;
    let web = ctl(host, "show vm/web")?;
    assert_eq!(
        (&web["memory"]["persistent"], &web["cpu_limit"]["accepted"]),
        (&json!(256 << 20), &json!("none")),
        "{web}"
    );
    let health = ctl(host, "health")?;
    ensure!(health["ok"] == true, "{health}");
    Ok(())
}

fn the_config_lives(host: &Host) -> Result<()> {
    let pid = host.ssh("root", "systemctl show -P MainPID agentd")?;
    assert_eq!(exit(host, "root", "agentd --check")?, 0);
    // A bad file changes nothing and is told; systemd's reload itself ends either way.
    host.ssh("root", "cp /etc/agentd/agentd.toml /root/good.toml && echo 'typo = 1' >>/etc/agentd/agentd.toml")?;
    assert_eq!(exit(host, "root", "agentd --check")?, 1);
    assert_eq!(exit(host, "root", "ctl check-config")?, 2);
    host.ssh("root", "systemctl reload agentd")?;
    let health = host.try_ssh("root", "ctl health").map(printed)?;
    ensure!(health.contains("typo"), "{health}");
    let status = host.ssh("root", "sleep 3; systemctl status --no-pager agentd")?;
    ensure!(status.contains("not reloaded"), "{status}");
    assert_eq!(exit(host, "member", "ctl resize container/cache --cpus 0.8")?, 0, "the file before is in force");
    // A good one heals that; the kill switch is one.
    host.ssh(
        "root",
        "sed 's/^#read_only = false/read_only = true/' good.toml >/etc/agentd/agentd.toml && systemctl reload agentd",
    )?;
    assert_eq!(exit(host, "root", "ctl resize container/cache --cpus 0.9")?, 5);
    assert_eq!(exit(host, "root", "ctl show container/cache")?, 0);
    host.ssh(
        "root",
        "cp good.toml /etc/agentd/agentd.toml && systemctl reload agentd && ctl resize container/cache --cpus 0.9",
    )?;
    assert_eq!(host.ssh("root", "systemctl show -P MainPID agentd")?, pid, "one life all the while");
    Ok(())
}

/// Two services of ours, one in a slice of its own: what is changed for good is there after a reboot, see [`rebooted`].
fn units(host: &Host) -> Result<()> {
    for (name, more) in [("batch", ""), ("batch2", ""), ("sliced", "Slice=lab-inner.slice\n")] {
        let text = format!("[Service]\nExecStart=/bin/sleep infinity\n{more}[Install]\nWantedBy=multi-user.target\n");
        host.ssh("root", &format!("cat >/etc/systemd/system/{name}.service <<'END'\n{text}END"))?;
    }
    let section = "[units]\nallow = [\"batch*.service\", \"sliced.service\", \"lab*.slice\"]\n[units.cgroups]\nraw = \"/raw\"\n\
                   [[limit]]\nmatch = \"unit/*\"\nunlimited = true\n";
    host.ssh("root", &format!("cat >>/etc/agentd/agentd.toml <<'END'\n{section}END"))?;
    host.ssh(
        "root",
        "systemctl daemon-reload; systemctl enable --now batch batch2 sliced 2>&1; mkdir /sys/fs/cgroup/raw; systemctl restart agentd",
    )?;
    up(host)?;
    let batch =
        "cat /sys/fs/cgroup/system.slice/batch.service/cpu.max /sys/fs/cgroup/system.slice/batch.service/memory.max";
    // By somebody in the right group; the cgroup shows it, systemd reads its units anew, and it is still so.
    host.ssh("member", "ctl resize batch.service --cpus 0.3 --memory 64MiB")?;
    assert_eq!(host.ssh("root", batch)?, "30000 100000\n67108864");
    host.ssh("root", "systemctl daemon-reload; sleep 3")?;
    assert_eq!(host.ssh("root", batch)?, "30000 100000\n67108864");
    let unit = ctl(host, "show unit/batch.service")?;
    assert_eq!((&unit["cpus"]["persistent"], &unit["memory"]["persistent"]), (&json!(0.3), &json!(64 << 20)), "{unit}");
    host.ssh("member", "ctl resize batch.service --cpus none --memory none")?;
    assert_eq!(host.ssh("root", batch)?, "max 100000\nmax");
    host.ssh("member", "ctl undo batch.service")?;
    assert_eq!(host.ssh("root", batch)?, "30000 100000\n67108864");
    // For now only, over what is saved: that goes back to both.
    host.ssh("member", "ctl resize batch.service --cpus 0.5 --live-only && ctl resize batch.service --cpus 0.6")?;
    host.ssh("member", "ctl undo batch.service")?;
    let unit = ctl(host, "show unit/batch.service")?;
    assert_eq!((&unit["cpus"]["accepted"], &unit["cpus"]["persistent"]), (&json!(0.5), &json!(0.3)), "{unit}");
    host.ssh("member", "ctl undo batch.service")?;
    assert_eq!(exit(host, "member", "ctl resize batch.service --cpus 0.5 --next-boot")?, 9);
    // By hand: noticed at once, as systemd says so.
    host.ssh("root", "systemctl set-property batch.service CPUQuota=40%")?;
    wait_until("drift on record", LIMIT, || {
        Ok((ctl(host, "history unit/batch.service")?["items"][0]["happening"] == "drift").then_some(()))
    })?;
    // Down, changed, and up with that.
    host.ssh("member", "ctl stop batch.service && ctl resize batch.service --cpus 0.7 && ctl start batch.service")?;
    assert_eq!(host.ssh("root", batch)?, "70000 100000\n67108864");

    // A slice with a limit is charged for what is in it. systemd's own and the engines' are nobody's units.
    let committed = || -> Result<f64> { ctl(host, "capacity")?["cpus"]["committed"].as_f64().context("a number") };
    let before = committed()?;
    host.ssh("root", "ctl resize lab.slice --cpus 1 && ctl resize sliced.service --cpus 0.5")?;
    assert_eq!(
        host.ssh("root", "cat /sys/fs/cgroup/lab.slice/lab-inner.slice/sliced.service/cpu.max")?,
        "50000 100000"
    );
    wait_until("the slice alone to be charged", LIMIT, || {
        ctl(host, "list --kind unit")?;
        Ok(((committed()? - before - 1.0).abs() < 0.001).then_some(()))
    })?;
    host.ssh(
        "root",
        "sed -i 's/^allow = .\"batch.*/allow = [\"*\"]/' /etc/agentd/agentd.toml && systemctl reload agentd",
    )?;
    wait_until("all units", LIMIT, || {
        let listed = host.ssh("root", "ctl list --kind unit")?;
        Ok(listed.contains("docker.service").then_some(()))
    })?;
    for others in ["docker-", "machine-qemu", "unit/machine.slice", "unit/system.slice"] {
        let listed = host.ssh("root", "ctl list --kind unit")?;
        ensure!(!listed.contains(others), "{others}: {listed}");
    }
    let narrow = "allow = [\"batch*.service\", \"sliced.service\", \"lab*.slice\"]";
    host.ssh(
        "root",
        &format!("sed -i 's/^allow = .\"[*].*/{narrow}/' /etc/agentd/agentd.toml && systemctl reload agentd"),
    )?;
    assert_eq!(exit(host, "root", "ctl show unit/docker.service")?, 6);

    // A cgroup that is ours.
    host.ssh("member", "ctl resize unit/raw --cpus 0.4 --memory 32MiB")?;
    assert_eq!(
        host.ssh("root", "cat /sys/fs/cgroup/raw/cpu.max /sys/fs/cgroup/raw/memory.max")?,
        "40000 100000\n33554432"
    );
    // For the reboot: one that lasts, one that doesn't.
    host.ssh("root", "ctl resize batch.service --cpus 0.6 && ctl resize batch2.service --cpus 0.4 --live-only")
        .map(drop)
}

/// Restarts and suspensions of units: jobs of systemd's, and the freezer of cgroup v2.
fn power_of_units(host: &Host) -> Result<()> {
    let sleep = "ExecStartPre=/bin/sh -c 'test ! -e /run/broken'\nExecStart=/bin/sleep infinity\n";
    for (name, text) in [
        ("batch-power", format!("[Service]\n{sleep}")),
        ("batch-hangs", format!("[Unit]\nRequires=batch-power.service\nAfter=batch-power.service\n[Service]\n{sleep}")),
    ] {
        host.ssh("root", &format!("cat >/etc/systemd/system/{name}.service <<'END'\n{text}END"))?;
    }
    host.ssh("root", "systemctl daemon-reload; systemctl start batch-power batch-hangs")?;
    let run = |unit: &str| host.ssh("root", &format!("systemctl show -p ActiveState,MainPID {unit}.service"));
    let show = || ctl(host, "show unit/batch-power.service");
    wait_until("the unit", LIMIT, || Ok((show()?["state"] == "running").then_some(())))?;

    // Another run of it, and what hangs on it is up again, too.
    let before = (run("batch-power")?, run("batch-hangs")?);
    host.ssh("member", "ctl restart batch-power.service")?;
    wait_until("what hangs on it", LIMIT, || Ok(run("batch-hangs")?.contains("ActiveState=active").then_some(())))?;
    let after = (run("batch-power")?, run("batch-hangs")?);
    ensure!(after.0 != before.0 && after.1 != before.1, "{before:?} {after:?}");

    let frozen = || host.ssh("root", "grep frozen /sys/fs/cgroup/system.slice/batch-power.service/cgroup.events");
    host.ssh("member", "ctl suspend batch-power.service --reason backup")?;
    assert_eq!(frozen()?, "frozen 1");
    assert_eq!(exit(host, "member", "ctl restart batch-power.service --force")?, 10, "it is held");
    host.ssh("root", "systemctl restart agentd")?;
    up(host)?;
    let unit = show()?;
    let hold = &unit["holds"][0];
    assert_eq!(
        (&unit["state"], &hold["hold"], &hold["reason"]),
        (&json!("paused"), &json!("suspended"), &json!("backup"))
    );
    host.ssh("root", "systemctl thaw batch-power.service")?;
    wait_until("the wake on record", LIMIT, || {
        let newest = ctl(host, "history unit/batch-power.service")?["items"][0].clone();
        Ok((newest["happening"] == "drift" && newest["moves"][0]["after"] == "running").then_some(()))
    })?;
    host.ssh("member", "ctl suspend batch-power.service --reason again && ctl resume batch-power.service")?;
    assert_eq!((frozen()?.as_str(), &show()?["holds"]), ("frozen 0", &json!([])));

    // One that doesn't come up again is told, and held.
    host.ssh("root", "touch /run/broken")?;
    assert_eq!(exit(host, "member", "ctl restart batch-power.service --timeout 5s")?, 7);
    assert_eq!(show()?["holds"][0]["hold"], "needs-attention");
    host.ssh("root", "rm /run/broken; ctl clear-hold batch-power.service && ctl start batch-power.service")?;
    assert_eq!(show()?["state"], "running");
    // Neither is a slice restarted, nor a cgroup.
    for of in ["unit/lab.slice", "unit/raw"] {
        assert_eq!(exit(host, "root", &format!("ctl restart {of} --force"))?, 9, "{of}");
    }
    let files = "/etc/systemd/system/batch-hangs.service /etc/systemd/system/batch-power.service";
    host.ssh("root", &format!("systemctl stop batch-hangs batch-power; rm {files}; systemctl daemon-reload")).map(drop)
}

/// The journal, and what else the hardened agentd may read.
fn logs(host: &Host) -> Result<()> {
    let service = "[Service]\nExecStart=/bin/sh -c 'echo one; echo two >&2; while sleep 1; do echo tick; done'\n";
    host.ssh("root", &format!("cat >/etc/systemd/system/batch-log.service <<'END'\n{service}END"))?;
    host.ssh("root", "systemctl daemon-reload; systemctl start batch-log")?;
    let all = "ctl logs batch-log.service --since 1h";
    wait_until("the first lines", LIMIT, || Ok(host.ssh("root", all)?.contains("one\ntwo\ntick").then_some(())))?;
    assert_eq!(host.ssh("root", "ctl logs unit/batch-log.service --tail 1")?, "tick");
    // Whoever follows gets what comes, and leaves no journalctl behind.
    let follow = "timeout 60 ctl logs batch-log.service -f --tail 0 | head -n 2";
    assert_eq!(host.ssh("root", follow)?, "tick\ntick");
    wait_until("journalctl's end", LIMIT, || Ok((exit(host, "root", "pgrep -x journalctl")? == 1).then_some(())))?;
    host.ssh("root", "systemctl stop batch-log")?;
    for (of, code) in [("unit/raw", 9), ("unit/lab.slice", 9), ("container/db", 0), ("vm/web", 0)] {
        assert_eq!(exit(host, "root", &format!("ctl logs {of} --tail 1"))?, code, "{of}");
    }
    ensure!(host.ssh("root", "ctl logs vm/web")?.contains("STAT"), "the guest's console");
    assert_eq!(exit(host, "member", "ctl logs batch-log.service")?, 5, "its rule has no such right");
    host.ssh("root", "rm /etc/systemd/system/batch-log.service; systemctl daemon-reload").map(drop)
}

/// What [`units`] has left behind.
fn rebooted(host: &Host) -> Result<()> {
    let cgroup = |name: &str| host.ssh("root", &format!("cat /sys/fs/cgroup/system.slice/{name}.service/cpu.max"));
    assert_eq!((cgroup("batch")?.as_str(), cgroup("batch2")?.as_str()), ("60000 100000", "max 100000"));
    let unit = ctl(host, "show unit/batch.service")?;
    assert_eq!((&unit["cpus"]["accepted"], &unit["cpus"]["persistent"]), (&json!(0.6), &json!(0.6)), "{unit}");
    assert_eq!(ctl(host, "show unit/raw")?["state"], "stopped", "it went with that boot");
    // Out of the way of what counts CPUs after this.
    host.ssh("root", "systemctl disable --now batch batch2 sliced 2>&1; ctl resize lab.slice --cpus none").map(drop)
}

fn what_a_shell_finds(host: &Host) -> Result<()> {
    for (page, words) in [
        ("ctl", "Exit codes|ctl-resize|--host"),
        ("ctl-resize", "--live-only"),
        ("8 agentd", "SIGHUP"),
        ("agentd.toml", "shrink_margin"),
    ] {
        let text = host.ssh("root", &format!("MANPAGER=cat MANWIDTH=100 man {page}"))?;
        // Set in lines of one width, with more than one blank where that takes it.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        ensure!(words.split('|').all(|word| text.contains(word)), "{page}: {text}");
    }
    // A login of a user as the distribution makes one, each with a terminal of its own.
    let tmux = |keys: &str, sees: &str| -> Result<()> {
        let named = format!("tmux -f /dev/null -L {}", keys.replace(' ', "_"));
        host.ssh("member", &format!("cd; {named} new-session -d -x 160 -y 50 'bash -i'"))?;
        std::thread::sleep(Duration::from_secs(2));
        host.ssh("member", &format!("{named} send-keys '{keys}' Tab; sleep 2; {named} send-keys Tab"))?;
        let screen = || host.ssh("member", &format!("{named} capture-pane -p"));
        wait_until(&format!("{sees:?} after {keys:?} and <TAB>"), LIMIT, || {
            let screen = screen()?;
            Ok(sees.split('|').all(|word| screen.contains(word)).then_some(()))
        })
        .with_context(|| screen().unwrap_or_default())?;
        host.ssh("member", &format!("{named} kill-server")).map(drop)
    };
    tmux("ctl ", "resize|capacity|history|undo")?;
    tmux("ctl resize ", "vm/web|container/db|container/cache")?;
    tmux("ctl resize --mem", "--memory")
}

/// From here, which is outside: by the system's ssh, which finds its key and the host's in a config of its own.
fn from_another_machine(host: &Host) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (port, key, public) = host.address();
    let file = |name: &str| folder.path().join(name);
    fs::write(file("known_hosts"), format!("[127.0.0.1]:{port} {}", fs::read_to_string(public)?))?;
    let config = format!("IdentityFile {}\nUserKnownHostsFile {}\n", key.display(), file("known_hosts").display());
    fs::write(file("config"), config)?;
    fs::write(file("ssh"), format!("#!/bin/sh\nexec /usr/bin/ssh -F {} \"$@\"\n", file("config").display()))?;
    fs::set_permissions(file("ssh"), fs::Permissions::from_mode(0o755))?;
    host.ssh("root", "for user in member stranger; do install -d -o $user -m 700 /home/$user/.ssh; install -o $user -m 600 /root/.ssh/authorized_keys /home/$user/.ssh/; done")?;
    let ctl = std::env::current_exe()?.ancestors().nth(2).context("a folder")?.join("ctl");
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH")?);
    let remote = |user: &str, line: &str| -> Result<(i32, String)> {
        let mut command = Command::new(&ctl);
        command.env("PATH", &path).args(["--host", &format!("ssh://{user}@127.0.0.1:{port}")]).args(line.split(' '));
        let output = command.output()?;
        Ok((output.status.code().context("an exit code")?, printed(output)))
    };
    let (code, text) = remote("root", "list")?;
    ensure!(code == 0 && text.contains("vm/web"), "{code}: {text}");
    let (code, text) = remote("member", "resize container/cache --cpus 1 --memory 96MiB")?;
    ensure!(code == 0, "{code}: {text}");
    assert_eq!(cpu_max(host, "cache")?, "100000 100000");
    let who = &self::ctl(host, "history container/cache")?["items"][0]["who"]["uid"];
    assert_eq!(who.to_string(), host.ssh("member", "id -u")?, "who asked is who logged in");
    let (code, text) = remote("member", "resize container/cache --cpus 100")?;
    ensure!(code == 4, "{code}: {text}");
    // ssh goes through and the socket doesn't: a change was not sent.
    let (code, text) = remote("stranger", "resize container/cache --cpus 2")?;
    ensure!(code == 3 && text.contains("no agentd answers"), "{code}: {text}");
    let (code, text) = remote("nobody-there", "list")?;
    ensure!(code == 3 && text.contains("ssh"), "{code}: {text}");
    // No shell is asked for anything.
    host.ssh("root", "usermod -s /usr/bin/cat labelled && cp -r /home/member/.ssh /home/labelled/ && chown -R labelled: /home/labelled/.ssh")?;
    let (code, text) = remote("labelled", "list")?;
    ensure!(code == 0 && text.contains("container/cache"), "{code}: {text}");

    // Interrupted while it waits: the change goes on there, and here neither its ssh nor its folder is left.
    host.ssh("root", "pkill -STOP -f '[g]uest=web'")?;
    let waiting = Command::new(&ctl)
        .env("PATH", &path)
        .env("TMPDIR", folder.path())
        .args(["--host", &format!("ssh://member@127.0.0.1:{port}"), "resize", "vm/web", "--cpus", "+1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let operation = under_way(host)?;
    let ours = format!("{}/ctl-", folder.path().display());
    let of_ssh = || Command::new("pgrep").args(["-f", &ours]).output();
    ensure!(of_ssh()?.status.success(), "an ssh is there");
    kill(Pid::from_raw(waiting.id().cast_signed()), Signal::SIGINT)?;
    let output = waiting.wait_with_output()?;
    let code = output.status.code();
    ensure!(code == Some(130), "{code:?}: {}", printed(output));
    wait_until("no ssh of it", LIMIT, || Ok((!of_ssh()?.status.success()).then_some(())))?;
    let left = fs::read_dir(folder.path())?.filter_map(Result::ok).map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with("ctl-")).collect();
    ensure!(left.is_empty(), "{left:?}");
    host.ssh("root", "pkill -CONT -f '[g]uest=web'")?;
    let view = ended(host, &operation)?;
    whole(host, &view)
}

/// A VM on KVM inside an emulated host: only where that is asked for, since not every machine's emulation is up to it, and some
/// take the whole host with them.
fn nested_kvm(host: &Host) -> Result<()> {
    let made = "sed -e \"s/type='qemu'/type='kvm'/\" -e 's/<name>web/<name>fast/' -e 's/web-console/fast-console/' web.xml >fast.xml && \
                virsh -q define fast.xml && timeout 120 virsh -q start fast && \
                for n in $(seq 90); do tail -n 1 /var/log/libvirt/qemu/fast-console.log | grep -q STAT && exit 0; sleep 1; done; exit 1";
    roomy(host)?;
    // The emulated one goes first: two guests are many for two emulated processors.
    let _ = host.try_ssh("root", "virsh -q destroy web");
    if exit(host, "root", made).unwrap_or(255) != 0 {
        bail!("no VM runs on nested KVM here");
    }
    let resized = host.try_ssh("root", "ctl resize fast --cpus 2 --memory 200MiB --wait 60s")?;
    let resized = printed(resized);
    println!("nested KVM: {resized}");
    ensure!(resized.contains("cpus 1 → 2"), "{resized}");
    Ok(())
}

fn engines_in_any_order(host: &Host) -> Result<()> {
    let engines =
        "docker.socket docker.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket libvirtd.service";
    host.ssh("root", &format!("systemctl stop agentd.service {engines}; systemctl start agentd.service"))?;
    assert_eq!(host.ssh("root", "systemctl is-active agentd.service")?, "active", "without either");
    assert_eq!(exit(host, "root", "ctl health")?, 3);
    let list = ctl(host, "list")?;
    assert_eq!(list["unavailable"], json!(["vm", "container"]), "{list}");
    host.ssh("root", "systemctl start docker.service")?;
    wait_until("containers", LIMIT, || {
        let list = ctl(host, "list --kind container")?;
        Ok((list["total"] == 2 && list["unavailable"] == json!(["vm"])).then_some(()))
    })?;
    // Docker came up anew, and with it none of its containers.
    host.ssh("root", "docker start db cache && ctl resize container/db --cpus 1")?;
    host.ssh("root", "systemctl start libvirtd.service")?;
    up(host)?;
    let told = host.ssh("root", "journalctl -u agentd --no-pager -o cat | grep -c \"vms can't be listed\"")?;
    ensure!(told.parse::<u32>()? < 5, "each try is told: {told}");
    assert_eq!(ctl(host, "show vm/web")?["state"], "running");
    host.ssh("root", "systemctl restart agentd.service")?;
    up(host)
}

/// The id of an operation that is under way on a VM whose QEMU doesn't answer, so that it stays under way.
fn in_the_middle(host: &Host) -> Result<String> {
    host.ssh("root", "pkill -STOP -f '[g]uest=web'")?;
    host.ssh("root", "nohup ctl resize vm/web --cpus +1 >/root/ctl.out 2>&1 </dev/null & sleep 0.1")?;
    under_way(host)
}

/// The id of the operation that is under way on the VM, once it has begun a step.
fn under_way(host: &Host) -> Result<String> {
    wait_until("a step under way", LIMIT, || {
        let socket = "curl -s --unix-socket /run/agentd/agentd.sock 'http://agentd/v1/operations?ref=vm/web'";
        let operations: Value = serde_json::from_str(&host.ssh("root", socket)?)?;
        let newest = &operations["items"][0];
        let doing = newest["steps"].as_array().into_iter().flatten().any(|step| step["state"] == "doing");
        Ok((newest["outcome"] == "running" && doing)
            .then(|| newest["operation"].as_str().unwrap_or_default().to_owned()))
    })
}

/// Waits for the end of an operation.
fn ended(host: &Host, operation: &str) -> Result<Value> {
    wait_until("the operation's end", LIMIT, || {
        let socket = format!("curl -s --unix-socket /run/agentd/agentd.sock http://agentd/v1/operations/{operation}");
        let view: Value = serde_json::from_str(&host.ssh("root", &socket)?)?;
        Ok((view["outcome"] != "running" && view["outcome"] != "unknown").then_some(view))
    })
}

/// What is accepted and saved is whole, either way, and nothing is held.
fn whole(host: &Host, view: &Value) -> Result<()> {
    let outcome = view["outcome"].as_str().unwrap_or_default().to_owned();
    ensure!(["changed", "pending", "rolled-back", "abandoned"].contains(&outcome.as_str()), "{view}");
    let history = ctl(host, "history vm/web")?;
    let told = history["items"].as_array().into_iter().flatten().any(|entry| entry["operation"] == view["operation"]);
    ensure!(told, "{history}");
    wait_until("no hold", LIMIT, || Ok((ctl(host, "show vm/web")?["holds"] == json!([])).then_some(())))?;
    println!("ended as {outcome}: {}", host.ssh("root", "ctl history vm/web --limit 1")?);
    Ok(())
}

fn killed_in_a_change(host: &Host) -> Result<()> {
    let operation = in_the_middle(host)?;
    host.ssh("root", "kill -9 $(systemctl show -P MainPID agentd); pkill -CONT -f '[g]uest=web'")?;
    let view = ended(host, &operation)?;
    whole(host, &view)?;
    ensure!(host.ssh("root", "systemctl show -P NRestarts agentd")?.parse::<u32>()? >= 1, "systemd started it again");
    // ctl asked again under its key, and tells what became of it.
    wait_until("ctl to end", LIMIT, || Ok((exit(host, "root", "pgrep -x ctl")? != 0).then_some(())))?;
    println!("ctl meanwhile: {}", host.ssh("root", "cat /root/ctl.out")?);
    Ok(())
}

fn hung(host: &Host) -> Result<()> {
    let faster = "mkdir -p /run/systemd/system/agentd.service.d && printf '[Service]\\nWatchdogSec=6s\\n' \
                  >/run/systemd/system/agentd.service.d/lab.conf && systemctl daemon-reload && systemctl restart agentd";
    host.ssh("root", faster)?;
    up(host)?;
    let before = host.ssh("root", "systemctl show -P MainPID agentd")?;
    host.ssh("root", &format!("kill -STOP {before}"))?;
    wait_until("the watchdog to start it again", LIMIT, || {
        let now = host.ssh("root", "systemctl show -P MainPID,ActiveState agentd | tr '\\n' ' '")?;
        Ok((now.ends_with(" active") && !now.starts_with(&format!("{before} "))).then_some(()))
    })?;
    let told = host.ssh("root", "journalctl -u agentd --no-pager -o cat | grep -i watchdog")?;
    ensure!(told.to_lowercase().contains("watchdog timeout"), "{told}");
    up(host)?;
    host.ssh("root", "rm -r /run/systemd/system/agentd.service.d && systemctl daemon-reload").map(drop)
}

fn host_goes_down(host: &mut Host) -> Result<()> {
    for way in ["reboot", "power cut"] {
        let operation = in_the_middle(host)?;
        if way == "reboot" {
            host.reboot()?;
        } else {
            host.cut_power()?;
        }
        up(host)?;
        if way == "reboot" {
            rebooted(host).context("units after a reboot")?;
        }
        let view = ended(host, &operation)?;
        println!("{way}");
        whole(host, &view)?;
        // What may be promised is what runs: the VM is down with its host.
        let capacity = ctl(host, "capacity")?;
        assert_eq!(capacity["cpus"]["committed"], 0, "{way}: {capacity}");
        if way == "power cut" {
            break;
        }
        // What is asked of it next needs its QEMU only.
        host.ssh("root", "ctl start vm/web && docker start db cache").map(drop)?;
    }
    Ok(())
}

fn upgraded_in_a_change(host: &Host) -> Result<()> {
    // The next version: the same files under a higher number.
    host.ssh(
        "root",
        "dpkg-deb -R agentd.deb next && sed -i 's/^Version: .*/&.1/' next/DEBIAN/control && \
         dpkg-deb -b next next.deb >/dev/null && echo '# edited' >>/etc/agentd/agentd.toml",
    )?;
    let socket = host.ssh("root", "stat -c %i /run/agentd/agentd.sock")?;
    // As apt does it, but for the seconds that it takes between the two: they are longer than a hanging call.
    host.ssh("root", "dpkg --unpack next.deb 2>&1")?;
    let operation = in_the_middle(host)?;
    let goes_on = "(until systemctl is-active agentd | grep -q deactivating; do sleep 0.2; done; sleep 1; \
                   pkill -CONT -f '[g]uest=web') >/dev/null 2>&1 &";
    // And in any case at the end: where all of this takes longer than a hanging call, agentd ends at once, unseen.
    let configure = "dpkg --configure agentd 2>&1; code=$?; pkill -CONT -f '[g]uest=web'; exit $code";
    host.ssh("root", &format!("{goes_on} {configure}"))?;
    let view = ended(host, &operation)?;
    whole(host, &view)?;
    wait_until("ctl to end", LIMIT, || Ok((exit(host, "root", "pgrep -x ctl")? != 0).then_some(())))?;
    println!("ctl meanwhile: {}", host.ssh("root", "cat /root/ctl.out")?);
    assert_eq!(host.ssh("root", "tail -n 1 /etc/agentd/agentd.toml")?, "# edited");
    assert_eq!(host.ssh("root", "stat -c %i /run/agentd/agentd.sock")?, socket, "the socket stayed");
    ensure!(host.ssh("root", "dpkg-query -W agentd")?.ends_with(".1"), "the next version");
    up(host)
}

fn removed_and_purged(host: &Host) -> Result<()> {
    host.ssh("root", "apt-get remove -y agentd 2>&1")?;
    assert_eq!(host.ssh("root", "systemctl is-active agentd.service agentd.socket || true")?, "inactive\ninactive");
    assert_eq!(exit(host, "root", "test -e /etc/agentd/agentd.toml && test -e /var/lib/agentd/agentd.db")?, 0, "kept");
    assert_eq!(exit(host, "root", "test -e /run/agentd || test -e /usr/sbin/agentd")?, 1, "gone");
    // Back again: the config and the record are those of before.
    host.ssh("root", "apt-get install -y ./agentd.deb 2>&1")?;
    up(host)?;
    let history = ctl(host, "history vm/web")?;
    ensure!(history["items"].as_array().is_some_and(|items| !items.is_empty()), "{history}");
    // What an administrator has switched off stays off.
    host.ssh("root", "systemctl disable --now agentd.service 2>&1 && dpkg -i next.deb 2>&1")?;
    assert_eq!(host.ssh("root", "systemctl is-enabled agentd.service || true")?, "disabled");
    host.ssh("root", "systemctl mask agentd.service agentd.socket 2>&1 && dpkg -i next.deb 2>&1")?;
    assert_eq!(host.ssh("root", "systemctl is-enabled agentd.service agentd.socket || true")?, "masked\nmasked");
    assert_eq!(exit(host, "root", "pgrep -x agentd")?, 1, "it was started all the same");
    host.ssh("root", "systemctl unmask agentd.service agentd.socket 2>&1 && apt-get purge -y agentd 2>&1")?;
    let places = "/etc/agentd /var/lib/agentd /run/agentd /etc/systemd/system/agentd* /etc/systemd/system/*/agentd*";
    assert_eq!(host.ssh("root", &format!("ls -d {places} 2>/dev/null || true"))?, "", "nothing is left");
    Ok(())
}

/// The rpm's files and scripts, on the same systemd. Its dependencies have other names here.
fn as_an_rpm(host: &Host) -> Result<()> {
    host.put(&package("rpm")?, "/root/agentd.rpm")?;
    host.ssh("root", "rpm -i --nodeps agentd.rpm 2>&1")?;
    up(host)?;
    host.ssh(
        "root",
        "docker start db && ctl resize container/db --cpus 0.4 && echo '# edited' >>/etc/agentd/agentd.toml",
    )?;
    let pid = host.ssh("root", "systemctl show -P MainPID agentd")?;
    host.ssh("root", "rpm -U --nodeps --force agentd.rpm 2>&1")?;
    up(host)?;
    assert_eq!(host.ssh("root", "tail -n 1 /etc/agentd/agentd.toml")?, "# edited");
    ensure!(host.ssh("root", "systemctl show -P MainPID agentd")? != pid, "the new one runs");
    host.ssh("root", "rpm -e --nodeps agentd 2>&1")?;
    assert_eq!(host.ssh("root", "systemctl is-active agentd.service agentd.socket || true")?, "inactive\ninactive");
    assert_eq!(exit(host, "root", "test -e /usr/bin/ctl || test -e /run/agentd")?, 1, "gone");
    assert_eq!(exit(host, "root", "test -e /etc/agentd/agentd.toml.rpmsave")?, 0, "an edited config is kept");
    host.ssh("root", "rpm -i --nodeps agentd.rpm 2>&1")?;
    up(host)
}

/// What `make test-fast` leaves out. One test, because a host takes minutes to come up with what runs on it.
mod on_a_host {
    use super::*;

    #[test]
    fn the_package_does_all_that_it_says_from_the_first_install_to_the_purge() -> Result<()> {
        let mut host = installed()?;
        let exposure = host.ssh("root", "systemd-analyze security --no-pager agentd.service | tail -n 1")?;
        let level = exposure.split_whitespace().find_map(|word| word.parse::<f64>().ok()).context("a level")?;
        ensure!(level <= 1.1, "README says 1.1: {exposure}");
        is_kept_in(&host).context("what the unit leaves it")?;
        populate(&host)?;
        roomy(&host)?;
        let status = host.ssh("root", "sleep 3; systemctl status --no-pager agentd")?;
        println!("{exposure}\n{status}");
        ensure!(status.contains("1 vm, 2 containers, 0 changes under way"), "{status}");
        who_may_do_what(&host).context("rights")?;
        the_whole_job(&host).context("the whole job of the hardened unit")?;
        the_config_lives(&host).context("the config's life")?;
        units(&host).context("units of systemd")?;
        power_of_units(&host).context("power of units")?;
        logs(&host).context("logs")?;
        what_a_shell_finds(&host).context("manual pages and completions")?;
        from_another_machine(&host).context("ctl --host")?;
        upgraded_in_a_change(&host).context("upgraded in a change")?;
        killed_in_a_change(&host).context("killed in a change")?;
        hung(&host).context("the watchdog")?;
        engines_in_any_order(&host).context("engines in any order")?;
        host_goes_down(&mut host).context("the host goes down in a change")?;
        removed_and_purged(&host).context("removed and purged")?;
        as_an_rpm(&host).context("as an rpm")?;
        // The last, because it may take the emulated host with it.
        if std::env::var_os("AGENTD_NESTED_KVM").is_some() { nested_kvm(&host) } else { Ok(()) }
    }
}
