"""Entry of `make bench`: runs the comparisons and writes their reports.

    python3 tests/bench/run.py [--only NAME,...] [--rounds N] [--seconds S] [--short] [--out FOLDER]

Reports go to docs/measurements, those of --short to <target folder>/bench. A comparison that fails is named at the end and
makes the exit status 1; the others still run.
"""

import argparse
import os
import resource
import shlex
import sys

import comparisons
import costs
import lab

ALL = {
    "mooncake": comparisons.mooncake, "nixl": comparisons.nixl, "samehost": comparisons.samehost,
    "latency": comparisons.latency, "scale": costs.scale, "idle": costs.idle,
}


def arguments():
    parser = argparse.ArgumentParser(description="peers and ours side by side")
    parser.add_argument("--only", help=f"comma list of {', '.join(ALL)}")
    parser.add_argument("--rounds", type=int, help="rounds per case (7; short: 3)")
    parser.add_argument("--seconds", type=float, help="seconds per run (2; short: 1)")
    parser.add_argument("--short", action="store_true", help="few, short runs; files to the target folder")
    parser.add_argument("--out", help="folder of the reports")
    return parser.parse_args()


def main():
    given = arguments()
    # For the peers as well: hundreds of connections take more descriptors than the usual soft limit.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    names = given.only.split(",") if given.only else list(ALL)
    unknown = [name for name in names if name not in ALL]
    if unknown:
        sys.exit(f"no comparison is called {', '.join(unknown)}; there are {', '.join(ALL)}")
    folder = given.out or (os.path.join(lab.TARGET, "bench") if given.short else os.path.join(lab.ROOT, "docs", "measurements"))
    command = shlex.join(["python3", "tests/bench/run.py", *sys.argv[1:]])
    options = comparisons.Options(
        given.rounds or (3 if given.short else 7), given.seconds or (1.0 if given.short else 2.0), 1 if given.short else 3, folder, command)
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        lab.Foreign.shares.clear()
        try:
            ALL[name](options)
        except lab.BenchError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
