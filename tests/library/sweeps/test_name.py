"""A job's folder is named by its overrides."""

from downslope.sweeps.name import LONGEST, job_name


def test_plain_overrides_are_the_name() -> None:
    assert job_name("device=cpu,lr=0.01") == "device=cpu,lr=0.01"


def test_odd_or_long_overrides_never_share_a_name() -> None:
    odd = ["data.path=a/b.csv", "data.path=a-b.csv", "data.path=a b.csv", "", ".", "x" * 300, "x" * 301, "a@b"]
    names = [job_name(each) for each in odd]
    assert len(set(names)) == len(odd)
    assert all(0 < len(name) <= LONGEST and "/" not in name and " " not in name for name in names)


def test_a_shortened_name_still_shows_what_it_begins_with() -> None:
    assert job_name("data.path=tables/houses.csv").startswith("data.path=tables-houses.csv@")
