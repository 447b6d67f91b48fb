# pydock: nothing is built; these are the checks and the installation.
PYTHON  = python3
PYTHONS = $(sort $(wildcard /usr/bin/python3.[0-9] /usr/bin/python3.[0-9][0-9] $(PYENV_ROOT)/versions/3.*/bin/python3) $(PYTHON))
PREFIX  = /usr/local
COMPILE = import pathlib, sys; [compile(pathlib.Path(f).read_text(), f, "exec") for f in sys.argv[1:] if sys.version_info >= (3, 8)]

test:     # sudo make test; TESTS="-v -k NAME" picks some
	$(PYTHON) test_pydock.py $(TESTS)

bench:    # against docker and podman where they are installed; BENCH="run images" picks some
	$(PYTHON) test_pydock.py bench $(BENCH)

vm:       # in fresh machines, made by the program that BOX names; VM=CLASS picks some
	$(PYTHON) test_pydock.py vm $(VM)

lint:
	for python in $(PYTHONS); do $$python -W error -c '$(COMPILE)' pydock.py test_pydock.py || exit 1; done
	! command -v ruff >/dev/null || ruff check --isolated --no-cache --select E,F,W --ignore E731 --line-length 120 pydock.py test_pydock.py

install:  # the command pydock, and its byte code for PYTHON
	$(PYTHON) pydock.py install --prefix "$(PREFIX)" --destdir "$(DESTDIR)"

demo:
	$(PYTHON) pydock.py run --rm host echo Hello World

.PHONY: test bench vm lint install demo
