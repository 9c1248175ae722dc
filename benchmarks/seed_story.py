"""The story of examples/seed_story.py, told into docs/doctor.md by `--write`."""

import argparse
import subprocess
import sys

from benchmarks.federation import ROOT, machine_line, write_section


def main() -> None:
    """Run the example, print what it says, perhaps write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the story into docs/doctor.md")
    args = parser.parse_args()
    story = subprocess.run(
        [sys.executable, "examples/seed_story.py"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    print(story)
    if args.write:
        head = f"{machine_line()}: `python examples/seed_story.py`"
        write_section("seed_story", f"{head}\n\n```\n{story.strip()}\n```", page="doctor.md")


if __name__ == "__main__":
    main()
