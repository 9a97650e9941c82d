//! `ctl` as a command: what is typed wrong, what it prints, how it ends. On the fake engine and libvirt's test driver.

use agentd_tests::lab::{Agentd, TestNode, binary};
use anyhow::Result;
use serde_json::{Value, json};

fn agentd() -> Result<Agentd> {
    let spec = json!({"instances": [
        {"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "used": "200MiB"},
        {"name": "stuck", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "used": "200MiB"}],
        "faults": [{"instance": "vm/stuck", "nth": 2, "fault": "fail"}, {"instance": "vm/stuck", "nth": 3, "fault": "fail"}]});
    Agentd::with_config("[capacity]\ncpus = 16\n").fake(spec).start()
}

#[test]
fn what_is_typed_wrong_ends_with_its_code_and_changes_nothing() -> Result<()> {
    let agentd = agentd()?;
    let before = agentd.get("/v1/instances/vm/web")?.json();
    let long = "a".repeat(300);
    for (args, exit, code) in [
        (&["show", "a/b/c"][..], 2, "invalid-request"),
        (&["show", "../info?x="], 2, "invalid-request"),
        (&["show", "vm/.."], 2, "invalid-request"),
        (&["show", "a\nb"], 2, "invalid-request"),
        (&["show", &long], 2, "invalid-request"),
        (&["show", "pod/web"], 2, "invalid-request"),
        (&["show", "$(id)"], 6, "not-found"),
        (&["show", "vm/a;b?c=d#e"], 6, "not-found"),
        (&["show", "container/a;b"], 2, "invalid-request"),
        (&["resize", "web", "--cpus", "0"], 2, "invalid-request"),
        (&["resize", "web", "--cpus", "-2"], 2, "invalid-request"),
        (&["resize", "web", "--cpus", "1.5"], 2, "invalid-request"),
        (&["resize", "web", "--cpus", "1000000000"], 2, "invalid-request"),
        (&["resize", "web", "--cpus", "NaN"], 2, "invalid-request"),
        (&["resize", "web", "--cpus", "many"], 2, "invalid-request"),
        (&["resize", "web", "--cpus", "+3"], 9, "restart-required"),
        (&["resize", "web", "--memory", "0"], 2, "invalid-request"),
        (&["resize", "web", "--memory", "-2GiB"], 2, "invalid-request"),
        (&["resize", "web", "--memory", "1"], 4, "below-minimum"),
        (&["resize", "web", "--memory", "1.5GiB"], 2, "invalid-request"),
        (&["resize", "web", "--memory", "9223372036854775808"], 2, "invalid-request"),
        (&["resize", "web", "--memory", "8 GB!"], 2, "invalid-request"),
        (&["resize", "web", "--memory", "8GB"], 2, "invalid-request"),
        (&["resize", "web", "--cpus", "64"], 4, "capacity-exceeded"),
        (&["resize", "web", "--size", "huge"], 6, "not-found"),
        (&["resize", "web", "--cpus", "3", "--if-version", "old"], 10, "version-mismatch"),
        (&["resize", "web", "--cpus", "1", "--for", "2h"], 2, "invalid-request"),
        (&["resize", "web", "--cpus", "3", "--restart", "if-needed", "--live-only"], 2, "invalid-request"),
        (&["resize", "web", "--cpus", "3", "--restart", "never", "--force"], 2, "invalid-request"),
    ] {
        let output = agentd.ctl(args);
        assert_eq!(output.code, Some(exit), "{args:?}: {output:?}");
        assert!(output.stderr.contains(code), "{args:?}: {output:?}");
    }
    // Usage errors are clap's: exit 2 as well.
    for args in [&["resize", "web"][..], &["resize"], &["fly", "web"], &["resize", "web", "--live-only", "--next-boot"]]
    {
        assert_eq!(agentd.ctl(args).code, Some(2), "{args:?}");
    }
    assert_eq!(agentd.get("/v1/instances/vm/web")?.json(), before);
    Ok(())
}

#[test]
fn json_is_the_apis_own_and_quiet_says_nothing() -> Result<()> {
    let agentd = agentd()?;
    let shown: Value = serde_json::from_str(&agentd.ctl(&["show", "web", "-o", "json"]).stdout)?;
    assert_eq!(shown, agentd.get("/v1/instances/vm/web")?.json());
    for args in [&["list"][..], &["capacity"], &["sizes"], &["health"]] {
        let output = agentd.ctl(&[args, &["-o", "json"]].concat());
        serde_json::from_str::<Value>(&output.stdout)?;
        assert_eq!(output.code, Some(0), "{output:?}");
    }
    let quiet = agentd.ctl(&["-q", "resize", "web", "--cpus", "3"]);
    assert_eq!((quiet.code, quiet.stdout.as_str(), quiet.stderr.as_str()), (Some(0), "", ""));
    let refused: Value = serde_json::from_str(&agentd.ctl(&["resize", "web", "--cpus", "64", "-o", "json"]).stdout)?;
    assert_eq!((&refused["code"], &refused["largest_feasible"]), (&json!("capacity-exceeded"), &json!(4)));
    Ok(())
}

#[test]
fn a_change_half_undone_is_partial_and_held_until_somebody_has_looked() -> Result<()> {
    let agentd = agentd()?;
    let output = agentd.ctl(&["resize", "stuck", "--cpus", "4", "--memory", "2GiB"]);
    assert_eq!(output.code, Some(7), "{output:?}");
    assert!(output.stderr.contains("partial") && output.stderr.contains("clear-hold"), "{output:?}");
    let shown = agentd.ctl(&["show", "stuck"]);
    assert!(shown.stdout.contains("needs-attention"), "{shown:?}");
    assert_eq!(agentd.ctl(&["resize", "stuck", "--cpus", "3"]).code, Some(10));
    assert_eq!(agentd.ctl(&["clear-hold", "stuck"]).code, Some(0));
    assert_eq!(agentd.ctl(&["resize", "stuck", "--cpus", "3"]).code, Some(0));
    Ok(())
}

#[test]
fn without_an_agentd_it_says_where_it_looked() -> Result<()> {
    let agentd = agentd()?;
    agentd.kill()?;
    let output = agentd.ctl(&["list"]);
    assert_eq!(output.code, Some(3), "{output:?}");
    assert!(output.stderr.contains("agentd.sock"), "{output:?}");
    Ok(())
}

#[test]
fn an_id_serves_as_a_name_and_the_test_driver_does_what_it_can() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let node = TestNode::uniform(folder.path(), 2, (1, 4), (256, 1024))?;
    let config = format!("[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 16\n[scaling]\nmax_cpus = 8\n", node.uri());
    let agentd = Agentd::with_config(&config).start()?;
    let vm = agentd.get("/v1/instances")?.json()["items"][0].clone();
    let (name, id) = (vm["name"].as_str().unwrap_or_default(), vm["id"].as_str().unwrap_or_default());
    // A UUID serves as a name.
    assert_eq!(agentd.ctl(&["resize", id, "--cpus", "2"]).code, Some(0));
    assert_eq!(agentd.get(&format!("/v1/instances/vm/{name}"))?.json()["cpus"]["observed"], 2);
    let output = agentd.ctl(&["resize", name, "--cpus", "2", "--memory", "512MiB", "--dry-run"]);
    assert!(output.stdout.contains("libvirt setMemory live 512 MiB"), "{output:?}");
    assert_eq!(agentd.ctl(&["resize", name, "--cpu-limit", "0.5"]).code, Some(9), "the test driver has no cgroups");
    assert_eq!(agentd.ctl(&["stop", name]).code, Some(0));
    assert_eq!(agentd.ctl(&["stop", name]).code, Some(0));
    assert_eq!(agentd.ctl(&["resize", name, "--cpus", "3", "--live-only"]).code, Some(10));
    assert_eq!(agentd.ctl(&["start", name]).code, Some(0));
    Ok(())
}

#[test]
fn it_is_linked_to_no_engine() -> Result<()> {
    let output = std::process::Command::new("ldd").arg(binary("CTL_BIN", "ctl")?).output()?;
    let libraries = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(libraries.contains("libc.so") && !libraries.contains("virt"), "{libraries}");
    Ok(())
}
