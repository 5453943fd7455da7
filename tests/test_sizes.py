from __future__ import annotations

import pytest

from exporter.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512MB", 512_000_000),
        ("2GiB", 2 << 30),
        ("1.5GB", 1_500_000_000),
        ("3 kB", 3000),
        ("4KiB", 4096),
        ("1tb", 10**12),
        ("7B", 7),
        ("2G", 2_000_000_000),
        ("500m", 500_000_000),
        ("1Ki", 1024),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "512", "MB", "-1MB", "0MB", "0.1B", "1e3MB", "5 XB", "1,5GB", "9999999999GB"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a size such as 500M, 2GB or 1\.5GiB, found"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(7, "7 B"), (1500, "1.5 kB"), (269_100_000, "269.1 MB"), (10**15, "1000.0 TB")]
)
def test_sizes_are_shown_in_powers_of_1000(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
