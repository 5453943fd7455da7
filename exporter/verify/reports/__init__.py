"""A verification on paper: report.json for programs, report.xml (JUnit) for pipelines, report.html for people."""
