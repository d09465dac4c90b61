# Everything a fresh machine needs: `make demo` and `make test` create the environment themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Loopback only: no token is written into the home directory, so later `ray start` needs none.
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo serve test test-fast chaos browser lint docs examples bench sbom audit clean

# torch by pip, which knows of CPU builds that lie on this machine; the rest by uv, several times as fast, with hashes checked.
# --no-deps: requirements.txt is complete, and torch is there already. It has hashes for Linux; elsewhere pip resolves.
$(READY): pyproject.toml constraints.txt requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt uv torch
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --require-hashes --requirement requirements.txt \
	  || $(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements.txt \
	  || $(BIN)/pip install --quiet --constraint constraints.txt '.[dev]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable . || $(BIN)/pip install --quiet --no-deps --editable .
	touch $@

# The embedded world from end to end. People are rendered and fine-tuned on a local Ray; a small VAE and a denoiser learn from
# these LoRAs, to show that they do; the shipped synthesiser makes LoRAs of held-out people, who are drawn and scored beside
# their fine-tuned ones; then the service makes one more over HTTP.
demo: $(READY)
	$(BIN)/python jobs/world/make_faces.py --people 20000:20040 --views 8 --out demo/people
	$(BIN)/python jobs/world/make_faces.py --people 80000:80008 --views 8 --out demo/held_out
	$(BIN)/python jobs/build_corpus.py people=demo/people output=demo/corpus
	$(BIN)/python jobs/build_corpus.py people=demo/held_out output=demo/held_out_corpus
	$(BIN)/python jobs/train.py corpus=demo/corpus output=demo/training code_space=latent pca.of=vectors vae.latent_size=16 \
	  vae.hidden=[32] vae_training.steps=60 vae_training.warmup=10 denoiser_training.steps=150 denoiser_training.warmup=20
	$(BIN)/python jobs/evaluate.py corpus=demo/corpus held_out=demo/held_out_corpus output=demo/evaluation scales=[1.0] \
	  synthesizers.denoiser=tiny synthesizers.of_40_people=demo/training/synthesizer limit=8 diversity_people=0
	$(BIN)/python -m lora_diffusion.endpoint.demo --photo demo/held_out/person-080000/00.jpg --out demo/personalised
	@echo "corpus: demo/corpus, contact sheet demo/corpus/contact_sheet.png"
	@echo "synthesised LoRAs of held-out people: demo/evaluation/contact_sheet.png, report demo/evaluation/report.html"

# http://127.0.0.1:8000 until Ctrl-C
serve: $(READY)
	$(BIN)/lora-diffusion serve

# Two processes, as many as cores: a third is no faster. A file stays in one, as its tests share a Ray and what was trained.
test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# What one runs at every save: no Ray, no S3 server, no browser, nothing that trains for long.
test-fast: $(READY)
	$(BIN)/pytest -n 2 -m "not ray and not s3 and not browser and not slow"

# The page's tests need a Chromium. Where none can be had they are skipped, and say so.
browser:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null \
	       && timeout 300 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 \
	  || echo "no Chromium, and none could be installed: the tests of the page will be skipped"

# Kills at random until SECONDS are over: make chaos SECONDS=3600 SEED=7. The table of docs/RELIABILITY.md.
SECONDS ?= 600
SEED ?= 0
chaos: $(READY)
	$(BIN)/python tests/chaos/chaos.py --seconds $(SECONDS) --seed $(SEED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The documents as a site in site/, with its own search and no other machine. A broken link fails.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The notebooks of examples/, run from the top, with their results in them.
examples: $(READY)
	$(BIN)/jupyter-execute --inplace examples/*.ipynb
	$(BIN)/python examples/04_everywhere.py

# Figures of the README, into benchmarks/results (about 20 minutes on two cores).
bench: $(READY)
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python benchmarks/corpus_growth.py

# sbom.json (CycloneDX): all packages that run in production, with versions and licences.
sbom: $(READY)
	$(BIN)/python deploy/packages.py --sbom sbom.json

# Known holes in what is installed. It asks pypi.org, and fails for a package of which it got no answer.
audit: $(READY)
	$(BIN)/uv tool run pip-audit --strict --disable-pip --require-hashes --requirement requirements.txt --requirement deploy/torch.txt

clean:
	rm -rf $(VENV) demo site
