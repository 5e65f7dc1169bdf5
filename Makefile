# Thin: every line of work is a script, cargo or `cargo xtask`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-full bench check callgrind golden fuzz guest setup

# Prints how long a suite took, and keeps its exit status.
timed = start=$$SECONDS; $(2) || { status=$$?; echo "-- $(1): failed after $$((SECONDS - start)) s"; exit $$status; }; \
	echo "-- $(1): $$((SECONDS - start)) s"

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F '|' '{ printf "%-18s%s\n", $$1, $$2 }'

demo: setup ## Save and restore a guest in real QEMUs, and show what it took
	@cargo build --quiet --release --package vmstate-cli
	@"$${CARGO_TARGET_DIR:-target}/release/vmstate" demo

test: setup check ## Everything that CI runs
	@cargo xtask test

test-full: test callgrind ## The above, counted instructions, all of QEMU 7.2, old libvirts, and a longer fuzz
	@scripts/setup-old-libvirt.sh
	@$(call timed,full suites,VMSTATE_TEST_FULL=1 cargo test --quiet --package vmstate-rig)
	@$(MAKE) --no-print-directory fuzz

check: ## Format, lints, documentation and the checks of the tree
	@cargo clippy --version > /dev/null 2>&1 && cargo fmt --version > /dev/null 2>&1 || rustup component add clippy rustfmt
	@$(call timed,format,cargo fmt --check)
	@$(call timed,lints,cargo clippy --quiet --workspace --all-targets -- -D warnings)
	@$(call timed,documentation,RUSTDOCFLAGS='-D warnings' cargo doc --quiet --workspace --no-deps)
	@$(call timed,tree,cargo xtask layers && cargo xtask tidy && cargo xtask golden)

callgrind: ## Count the instructions of what is done most, and compare them with SPECIFICATION.md
	@scripts/setup.sh valgrind
	@$(call timed,instructions,cargo xtask callgrind)

bench: setup ## Compare QEMU's own ways with ours in one run
	@cargo build --quiet --release --package vmstate-cli
	@"$${CARGO_TARGET_DIR:-target}/release/vmstate" bench

golden: setup ## Make the golden images anew, with real QEMUs
	@cargo xtask golden --regenerate

fuzz: ## Run each fuzz target for a while (FUZZ_SECONDS, default 60)
	@command -v cargo-fuzz > /dev/null || cargo install --quiet --locked cargo-fuzz
	@command -v g++ > /dev/null || apt-get -qq -y --no-install-recommends install g++ > /dev/null
	@for target in $$(cargo fuzz list); do mkdir -p fuzz/corpus/$$target; \
		RUSTC_BOOTSTRAP=1 cargo fuzz run $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
		-max_total_time=$${FUZZ_SECONDS:-60} -verbosity=0; done

guest: ## Assemble the built-in guest
	@cd crates/lab/guest && as --64 -o guest.o guest.S && \
		ld -m elf_x86_64 -Ttext 0x7c00 --oformat binary -o guest.bin guest.o && rm guest.o && chmod 644 guest.bin

setup: ## Install what is missing
	@scripts/setup.sh
