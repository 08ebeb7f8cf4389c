import sys

from nab_defense.cli import main

if __name__ == "__main__":  # loader workers import this file again where they are spawned
    raise SystemExit(main(["bench", *sys.argv[1:]]))
