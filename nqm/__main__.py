"""``python -m nqm``: the command line where the script ``nqm`` is not on the path."""

from nqm.cli import main

if __name__ == "__main__":
    main(prog_name="python -m nqm")
