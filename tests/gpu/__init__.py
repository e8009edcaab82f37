"""What `make gpu` runs on a machine with a GPU: `python -m tests.gpu`. Nothing is installed."""
