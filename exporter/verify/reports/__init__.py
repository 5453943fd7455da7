"""Write a report as report.json for programs, report.xml (JUnit) for CI pipelines, and report.html for people."""
