"""Sums up a CTest run: summarise.py JUNIT_XML SHOW_ONLY_JSON.

Prints each failed and skipped test and, as the last line, "N passed, N failed, N skipped".
A test that skipped inside (GoogleTest's GTEST_SKIP) counts as skipped. Skipping is an error
unless the test is labelled gpu.
"""
import json
import re
import sys
import xml.etree.ElementTree as ElementTree


def labels_of(path):
    with open(path) as f:
        tests = json.load(f)["tests"]
    labels = {}
    for test in tests:
        properties = {p["name"]: p["value"] for p in test.get("properties", [])}
        labels[test["name"]] = properties.get("LABELS", [])
    return labels


def state_of(case):
    if case.find("failure") is not None or case.get("status") == "fail":
        return "failed"
    if case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
        return "skipped"
    output = case.findtext("system-out") or ""
    return "skipped" if re.search(r"^\[  SKIPPED \]", output, re.M) else "passed"


def main():
    labels = labels_of(sys.argv[2])
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    wrong = False
    try:
        cases = list(ElementTree.parse(sys.argv[1]).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        print(f"no test result could be read: {error}")
        cases = []
    for case in cases:
        name, state = case.get("name"), state_of(case)
        counts[state] += 1
        if state == "passed":
            continue
        print(f"{state}: {name}")
        if state == "skipped" and "gpu" not in labels.get(name, []):
            print(f"  {name} may not skip: it is not labelled gpu")
            wrong = True
    missing = set(labels) - {case.get("name") for case in cases}
    for name in sorted(missing):  # CTest itself died
        print(f"failed: {name} (did not run)")
        counts["failed"] += 1
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
    return 1 if counts["failed"] or wrong or not cases else 0


sys.exit(main())
