"""``python -m hwsearch``: the command line."""

from hwsearch.cli import main

if __name__ == "__main__":
    main()
