# Every target installs what it lacks (packaging/setup.sh, from the distribution's packages), so that each works on a bare
# machine with Rust.

SHELL = /bin/bash
.SHELLFLAGS = -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL = help

# CARGO_TARGET_DIR is cargo's own variable: what cargo builds into, we look into.
TARGET = $(or $(CARGO_TARGET_DIR),target)
# Built once, kept out of ~/.cargo.
TOOLS = $(TARGET)/tools
CARGO_DENY_VERSION = 0.20.2
CARGO_FUZZ_VERSION = 0.13.1
CARGO_MUTANTS_VERSION = 27.1.0
SCHEMATHESIS_VERSION = 4.32.5
SCHEMATHESIS = $(TOOLS)/schemathesis/$(SCHEMATHESIS_VERSION)

PREFIX = /usr
DESTDIR =
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

# How long `make fuzz` lets each target run; RUNS is a number of calls in place of a time, TARGETS some of them.
SECONDS_EACH = 60
RUNS =
TARGETS =

.PHONY: help setup build release check test test-fast definitions soak fuzz asan miri coverage mutants bugs demo bench bench-check bench-keep screenshot deny deb rpm stage install clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## What a build needs from the distribution
	packaging/setup.sh demo

build: setup ## agentd and ctl, for development
	cargo build -p agentd -p ctl

release: setup ## agentd and ctl, as they are packaged, with their manual pages and completions
	cargo build --release -p agentd -p ctl -p agentd-pages
	rm -rf $(TARGET)/share
	$(TARGET)/release/agentd-pages $(TARGET)/share
	for shell in bash zsh fish; do $(TARGET)/release/ctl completions $$shell >$(TARGET)/share/ctl.$$shell; done

check: ## Formatting, lints, unit tests, instructions counted: before every commit
	packaging/setup.sh check
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --features agentd/fake -- -D warnings
	cargo test --workspace --lib --bins --features agentd/fake
	cargo bench -p agentd-core --bench decide -- --instructions

# The end-to-end tests run the binaries, which `cargo test` does not build for another crate. The whole workspace, so that
# both commands see the same features and nothing is built twice. One test at a time: guests and engines that share a small
# machine slow each other down, and what they get is what some tests measure.
test: check deb rpm $(SCHEMATHESIS) ## Everything: `check`, on real engines, and the packages on a whole host
	packaging/setup.sh test host
	cargo build --workspace --features agentd/fake
	cargo test --workspace --features agentd/fake --test '*' -- --test-threads=1
	packaging/lint.sh $(TARGET)/packages/*

test-fast: check $(SCHEMATHESIS) ## The same without the packages and the whole host
	packaging/setup.sh test
	cargo build --workspace --features agentd/fake
	cargo test --workspace --features agentd/fake --test '*' -- --test-threads=1 --skip on_a_host::
	@echo "left out: the packages on a whole host (systemd, cgroup v2, users, reboot, upgrade, removal); make test has them"

# The simulation frees and takes much memory at once; left to itself the allocator gives it back to the kernel each time.
soak: export MALLOC_TRIM_THRESHOLD_ = 268435456
soak: export MALLOC_MMAP_THRESHOLD_ = 268435456
soak: export MALLOC_TOP_PAD_ = 67108864
soak: ## 1,000,000 simulated schedules, 10,000 kills, two hours of mixed load with faults: three hours on two processors
	packaging/setup.sh test
	cargo build --workspace --features agentd/fake
	cargo build --profile soak -p agentd-tests --bin soak
	$(TARGET)/soak/soak schedules --count 1000000
	cargo run -p agentd-tests --bin soak -- kills --count 10000
	env -u MALLOC_TRIM_THRESHOLD_ -u MALLOC_MMAP_THRESHOLD_ -u MALLOC_TOP_PAD_ \
		cargo run -p agentd-tests --bin soak -- mixed --seconds 7200

fuzz: $(TOOLS)/cargo-fuzz-$(CARGO_FUZZ_VERSION) ## What strangers write, thrown at its readers for SECONDS_EACH=60 (or RUNS=…), on a nightly compiler
	PATH=$(abspath $(TOOLS))/bin:$$PATH fuzz/run.sh $(abspath $(TARGET))/fuzz "$(SECONDS_EACH)" "$(RUNS)" $(TARGETS)

# Leaks are not looked for: libvirt gives back what it was given on the thread of its event loop, and the end of the tests ends that.
asan: ## The unit tests, unsafe code and all, under AddressSanitizer, on a nightly compiler
	packaging/setup.sh check
	ASAN_OPTIONS=detect_leaks=0 RUSTFLAGS=-Zsanitizer=address cargo +nightly test -p agentd --lib --features fake --target-dir $(TARGET)/asan \
		--target $(shell rustc -vV | sed -n 's/^host: //p')

miri: ## The decisions and what the record keeps of them, interpreted by Miri, on a nightly compiler
	rustup component add --toolchain nightly miri rust-src
	PROPTEST_CASES=2 MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test -p agentd-core --lib --target-dir $(TARGET)/miri

coverage: ## The lines and branches that the tests run, on a nightly compiler
	packaging/setup.sh test
	tests/coverage.sh $(abspath $(TARGET))/coverage

# A mutant is one change to the code; each is built and tested, and one that no test fails for is told.
mutants: $(TOOLS)/cargo-mutants-$(CARGO_MUTANTS_VERSION) ## Code changed in one place at a time, which the unit tests must notice: FILES='-f ledger.rs'
	$(TOOLS)/bin/cargo-mutants mutants --dir . --output $(TARGET) --no-shuffle $(FILES)

definitions: setup ## Prepares each definition that libvirt tests itself with, on a real libvirt
	packaging/setup.sh test
	cargo build --workspace --features agentd/fake
	tests/lab/definitions.sh $(abspath $(TARGET))/definitions
	AGENTD_DEFINITIONS=$(abspath $(TARGET))/definitions cargo test --workspace --features agentd/fake --test definitions -- --ignored --nocapture

bugs: setup ## Plants known defects one at a time; the simulation must find each
	PLANT_TARGET=$(abspath $(TARGET))/bugs tests/bugs/plant.sh

demo: ## The tour, in about a minute once built: nothing of the machine is changed
	packaging/demo.sh

# The fake engine is in what is measured, for the rows that are agentd's own time; so it is built apart from what is packaged.
bench bench-check bench-keep: setup
	packaging/setup.sh test bench
	cargo build --profile measured -p agentd -p ctl -p agentd-tests --features agentd/fake
	$(TARGET)/measured/bench $(patsubst bench-%,--%,$(filter-out bench,$@))

bench: ## agentd beside what people use instead, as ratios: about half an hour once built
bench-check: ## The ratios of it, compared with those that docs/bench.json has
bench-keep: ## The same, kept in docs/ and in the README

# ctl and agentd last, by themselves: without the fake engine, which the tests' own crate asks for.
screenshot: setup ## docs/top.svg: ctl top as it is, on real engines
	packaging/setup.sh test
	cargo build -p agentd-tests --bin screenshot
	cargo build -p agentd -p ctl
	$(TARGET)/debug/screenshot docs/top.svg

deny: $(TOOLS)/cargo-deny-$(CARGO_DENY_VERSION) ## Licences, bans and sources of the dependencies
	$(TOOLS)/bin/cargo-deny check licenses bans sources

# Both packages are made of what `install` puts into a folder: what is installed is said once.
deb: stage ## Debian package
	packaging/setup.sh deb
	rm -f $(TARGET)/packages/*.deb
	packaging/deb/build.sh $(TARGET)/stage $(VERSION) $(TARGET)/packages

rpm: stage ## RPM package
	packaging/setup.sh rpm
	rm -f $(TARGET)/packages/*.rpm
	rpmbuild -bb --quiet --define 'version $(VERSION)' --define 'stage $(abspath $(TARGET))/stage' \
		--define '_topdir $(abspath $(TARGET))/rpmbuild' --define '_rpmdir $(abspath $(TARGET))/packages' \
		--define '_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm' packaging/rpm/agentd.spec
	@ls $(TARGET)/packages/*.rpm

stage: release
	packaging/check-symbols.sh $(TARGET)/release/agentd $(TARGET)/release/ctl
	rm -rf $(TARGET)/stage
	$(MAKE) --no-print-directory install DESTDIR=$(TARGET)/stage PREFIX=/usr

# Builds nothing, so that `make release && sudo make install` leaves no files of root's behind. Keeps a config that is there.
install: share = $(DESTDIR)$(PREFIX)/share
install: ## Into DESTDIR, what `make release` has built
	install -D -m 755 $(TARGET)/release/agentd $(DESTDIR)$(PREFIX)/sbin/agentd
	install -D -m 755 $(TARGET)/release/ctl $(DESTDIR)$(PREFIX)/bin/ctl
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/systemd/system systemd/agentd.service systemd/agentd.socket
	sed -i 's|/usr/sbin/agentd|$(PREFIX)/sbin/agentd|' $(DESTDIR)$(PREFIX)/lib/systemd/system/agentd.service
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/sysusers.d sysusers.d/agentd.conf
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/lib/tmpfiles.d tmpfiles.d/agentd.conf
	install -D -m 644 -t $(share)/man/man1 $(TARGET)/share/*.1
	install -D -m 644 -t $(share)/man/man5 $(TARGET)/share/*.5
	install -D -m 644 -t $(share)/man/man8 $(TARGET)/share/*.8
	install -D -m 644 $(TARGET)/share/ctl.bash $(share)/bash-completion/completions/ctl
	install -D -m 644 $(TARGET)/share/ctl.zsh $(share)/zsh/site-functions/_ctl
	install -D -m 644 $(TARGET)/share/ctl.fish $(share)/fish/vendor_completions.d/ctl.fish
	install -D -m 644 -t $(share)/doc/agentd README.md ARCHITECTURE.md SECURITY.md CHANGELOG.md LICENSE
	install -D -m 644 -t $(share)/doc/agentd/prometheus packaging/prometheus/*
	[ -e $(DESTDIR)/etc/agentd/agentd.toml ] || install -D -m 644 packaging/agentd.toml $(DESTDIR)/etc/agentd/agentd.toml

clean: ## What cargo built
	cargo clean

$(TOOLS)/cargo-deny-$(CARGO_DENY_VERSION):
	packaging/setup.sh build
	cargo install --locked --root $(TOOLS) --version $(CARGO_DENY_VERSION) cargo-deny
	touch $@

$(TOOLS)/cargo-fuzz-$(CARGO_FUZZ_VERSION):
	packaging/setup.sh build fuzz
	cargo install --locked --root $(TOOLS) --version $(CARGO_FUZZ_VERSION) cargo-fuzz
	touch $@

$(TOOLS)/cargo-mutants-$(CARGO_MUTANTS_VERSION):
	packaging/setup.sh build
	cargo install --locked --root $(TOOLS) --version $(CARGO_MUTANTS_VERSION) cargo-mutants
	touch $@

$(SCHEMATHESIS):
	packaging/setup.sh contract
	rm -rf $(TOOLS)/schemathesis
	python3 -m venv $(TOOLS)/schemathesis
	$(TOOLS)/schemathesis/bin/pip install --quiet --disable-pip-version-check schemathesis==$(SCHEMATHESIS_VERSION)
	touch $@
