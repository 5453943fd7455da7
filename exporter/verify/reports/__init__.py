"""The forms of a report: report.json for programs, report.xml (JUnit) for pipelines, report.html for people."""
