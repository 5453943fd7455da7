"""Render report.xml for pipelines that read JUnit, with one test suite per artifact and one test case per check."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

#: Characters that XML 1.0 cannot represent. Error messages of runtimes may contain such characters.
_ILLEGAL: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(document: Mapping[str, Any]) -> bytes:
    """Return the content of report.xml for ``document``, which is the content of report.json."""
    xml = JUnitXml("ttexport verify")
    for artifact in document["artifacts"]:
        suite = TestSuite(_clean(f"{artifact['format']} {artifact['artifact']}"))
        for check in artifact["checks"]:
            case = TestCase(_clean(check["name"]), classname=_clean(artifact["artifact"]))
            if not check["passed"]:
                failure = Failure(_clean(_measured(check)), "not equivalent")
                failure.text = _clean(check["detail"])
                case.result = [failure]
            suite.add_testcase(case)
        for skip in artifact["skipped"]:
            case = TestCase(_clean(skip["name"]), classname=_clean(artifact["artifact"]))
            case.result = [Skipped(_clean(skip["reason"]))]
            suite.add_testcase(case)
        xml.add_testsuite(suite)
    xml.update_statistics()
    result: bytes = xml.tostring()
    return result


def _measured(check: Mapping[str, Any]) -> str:
    if check["value"] is None:
        return str(check["name"])
    return f"{check['name']}: expected at most {check['limit']}, found {check['value']}"


def _clean(text: str) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)
