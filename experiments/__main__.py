"""``python -m experiments``: the demo, training, ablations, studies and the page of evidence, from a checkout."""

from experiments.cli.app import app

if __name__ == "__main__":
    app(prog_name="python -m experiments")
