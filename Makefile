# Everything runs in .venv, which `make install` makes; every target makes what it needs and is quick when there is nothing to do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/demo
CHAIN ?= demo
PRETRAINING ?= runs/pretraining
ARGS ?=

# No telemetry, and nothing asks the network once the packages are there.
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

STAGES := corpus sft preferences reward ppo dpo evaluate
METHODS := listwise grpo rloo best_of_n known_optimum
CHAINS := scitldr xsum_t5_small cnn_flan_t5_base mnist mnist_long scratch_vs_finetuned pretraining
PROBLEMS := hw10 hw11 hw12 hw12b hw13

.PHONY: help install demo methods prompting images problems pretraining-text test test-slow lint format bench report results clean $(STAGES) $(METHODS) $(CHAINS) $(PROBLEMS)
.DEFAULT_GOAL := help

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'
	@echo "  make STAGE            bring one stage of the chain $(CHAIN) up to date: $(STAGES)"
	@echo "  make METHOD           one of $(METHODS), on the demo's models"
	@echo "  make CHAIN            one of $(CHAINS)"
	@echo "  make SET              one set of exercises: $(PROBLEMS)"
	@echo "  variables: CHAIN=$(CHAIN) RUN=$(RUN) ARGS='stage.key=value …' PYTHON=$(PYTHON)"

install: $(STAMP) ## make .venv with every pinned package and genalign in it

# torch first and by its exact version: a looser range would fetch gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: PYTHON=$(PYTHON): older than 3.11; give PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned packages into $(VENV) (once, 1 to 3 minutes) …"
	@start=$$(date +%s) && \
	    $(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 && \
	    $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[images,prompting,problems,dev]' && \
	    echo $$(( $$(date +%s) - start )) > $@

demo: $(STAMP) ## corpus -> SFT of the shipped T5 -> preferences -> reward model -> PPO -> DPO -> evaluation -> report
	@$(BIN)/genalign run demo $(ARGS)

$(STAGES): $(STAMP)
	@$(BIN)/genalign run $(CHAIN) --output_dir $(RUN) --until $@ $(ARGS)

methods: demo ## listwise DPO, GRPO, RLOO and best-of-n beside the demo's PPO and DPO
	@$(BIN)/genalign run methods $(ARGS)

$(METHODS): demo
	@$(BIN)/genalign run methods --until $@ $(ARGS)

images: $(STAMP) ## DDPM, bit-flip diffusion, VAE and GAN on the embedded digits, measured and drawn
	@$(BIN)/genalign run images $(ARGS)

prompting: $(STAMP) ## a small model of word tasks: solved examples, soft prompts, LoRA and full fine-tuning compared
	@$(BIN)/genalign run prompting $(ARGS)

problems: $(STAMP) ## every exercise of the problem set: computed, checked, drawn, one report
	@$(BIN)/genalign run all $(ARGS)

$(CHAINS) $(PROBLEMS): $(STAMP)
	@$(BIN)/genalign run $@ $(ARGS)

# Read, never imported: so nothing that these packages need is installed, and nothing of them enters .venv.
$(PRETRAINING)/packages/.installed: recipes/summarization/pretraining_packages.txt | $(STAMP)
	@echo "installing $$(grep -c == recipes/summarization/pretraining_packages.txt) packages to read into $(@D) (about 0.9 GB) …"
	@rm -rf $(@D)
	@$(BIN)/python -m pip install --quiet --no-deps --no-compile --only-binary :all: --target $(@D) \
	    --requirement recipes/summarization/pretraining_packages.txt
	@touch $@

pretraining-text: $(PRETRAINING)/packages/.installed ## the text and pairs that the shipped model is pretrained on
	@$(BIN)/python recipes/summarization/text.py site_packages=$(<D) output_dir=$(PRETRAINING)/text $(ARGS)

report: $(STAMP) ## write $(RUN)/report.html anew
	@$(BIN)/genalign report $(RUN)

test: $(STAMP) ## lint and the test suite (under 8 minutes on 2 cores)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadgroup

test-slow: $(STAMP) ## the tests marked slow
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

lint: $(STAMP) ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(STAMP) ## ruff, mending
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(STAMP) ## side-by-side timings, written to benchmarks/results
	@for file in benchmarks/*.py; do echo "== $$file"; HF_HUB_OFFLINE=1 $(BIN)/python $$file || exit 1; done

results: $(STAMP) ## copy the demo's metrics to docs/results and rewrite the README's table from them
	@$(BIN)/python -m pipelines.reporting.readme docs/results/demo.json README.md --run $(RUN)

clean: ## remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
