"""Tables that people bring: encodings, separators, broken rows, and dates that do not rise as they should."""

from __future__ import annotations

import calendar
import logging
import re
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

from fedgan_lightning.data.tables import Table
from fedgan_lightning.errors import ConfigurationError, DataError, FedGANError
from fedgan_lightning.samplers import AvailableClients
from fedgan_lightning.sources import CSVProfiles, Interactions

HOURS = [datetime(2021, 3, 1) + timedelta(hours=hour) for hour in range(24 * 60)]
#: An hourly file whose largest value of every day is at 18 o'clock.
ROWS = [f"{when},{10 if when.hour == 18 else 1 + when.hour / 100}" for when in HOURS]
PAIRS = [f"{user},{item},{user * item % 5 + 1},{user + item}" for user in range(1, 12) for item in range(1, 7)]
RATINGS = "userId,movieId,rating,timestamp"


@pytest.fixture
def table(tmp_path):
    """Return a function that writes a table and returns its path."""

    def write(rows, header="date,load", *, encoding="utf-8", before="", end="\n", name="a.csv"):
        path = tmp_path / name
        path.write_bytes((before + end.join([header, *rows]) + end).encode(encoding))
        return str(path)

    return write


def message_of(call) -> str:
    """Return the one line that a call ends in."""
    with pytest.raises(FedGANError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "; got " in str(caught.value)
    assert ". " in str(caught.value)
    return str(caught.value)


def replaced(place: int, *rows: str) -> list[str]:
    return [*ROWS[:place], *rows, *ROWS[place + 1 :]]


def peaks(source: CSVProfiles) -> set[int]:
    """Return the hours at which profiles have their largest value."""
    return {int(place) for split in ("train", "test") for place in source.load(split).x[:, 0].argmax(1)}


class TestDates:
    def test_the_largest_value_is_at_its_hour(self, table):
        assert peaks(CSVProfiles(table(ROWS))) == {18}

    def test_a_missing_hour_is_named_or_its_day_left_out_and_moves_no_other(self, table, caplog):
        caplog.set_level(logging.INFO, "fedgan_lightning")
        path = table([row for row in ROWS if not row.startswith("2021-03-28 02")])
        said = message_of(lambda: CSVProfiles(path).load("train"))
        assert "dates rise by one step, 1:00:00" in said
        assert "2021-03-28 01:00:00 in line 651 and 2021-03-28 03:00:00 in line 652" in said
        assert "1 missing between them" in said
        dropped = CSVProfiles(path, irregular="drop")
        assert peaks(dropped) == {18}
        assert len(dropped.load("train")) + len(dropped.load("test")) == 59
        assert caplog.text.count("1 of 60 profiles in") == 1
        assert peaks(CSVProfiles(path, irregular="consecutive")) == {17, 18}, "the control: rows as they follow"

    @pytest.mark.parametrize(
        ("rows", "received", "left"),
        [
            (replaced(50, ROWS[50], ROWS[50]), "line 52 and .* in line 53 of .*, the same date twice", 59),
            (replaced(50, ROWS[51], ROWS[50])[:51] + ROWS[50:51] + ROWS[52:], "in line 51 and .* in line 52", 60),
            (replaced(50, "2021-03-03 02:30:00,3"), "line 52 of .*, between two steps", 59),
            (ROWS[:50] + ROWS[50 + 48 :], "48 missing between them", 57),
            (replaced(16, "2021-03-01 16:00:00,nan"), "got 'nan' in line 18", 59),
            (replaced(16, "2021-03-01 16:00:00,"), "got an empty field in line 18", 59),
        ],
    )
    def test_rows_that_do_not_fit_are_named_or_their_days_left_out(self, table, rows, received, left):
        path = table(rows)
        assert re.search(received, message_of(lambda: CSVProfiles(path).load("train")))
        dropped = CSVProfiles(path, irregular="drop")
        assert peaks(dropped) == {18}
        assert len(dropped.load("train")) + len(dropped.load("test")) == left

    @pytest.mark.parametrize("irregular", ["refuse", "drop"])
    @pytest.mark.parametrize(
        ("rows", "said"),
        [
            (ROWS[::-1], "dates rise; got 2021-04-29 23:00:00 in line 2 and .* sort the rows"),
            ([f"{when.date()},{when.hour}" for when in HOURS], "lack the time of day"),
            (replaced(30, "2021-03-02 06:00:00+01:00,3"), "an offset, or none; got .* in line 32"),
            (replaced(30, "02/03/2021 06:00,3"), "a date in ISO 8601.*; got '02/03/2021 06:00' in line 32"),
            (replaced(30, ",3"), "a date in ISO 8601.*; got an empty field in line 32"),
        ],
    )
    def test_dates_that_make_no_grid_are_refused_either_way(self, table, rows, said, irregular):
        with pytest.raises(DataError, match=said):
            CSVProfiles(table(rows), irregular=irregular).load("train")

    def test_days_are_those_of_the_clock_that_was_written_down(self, table):
        """In local time with offsets the day of a clock change has 23 hours."""
        zone = pytest.importorskip("zoneinfo").ZoneInfo("Europe/Berlin")
        utc = [datetime(2021, 2, 28, 23, tzinfo=timezone.utc) + timedelta(hours=hour) for hour in range(24 * 60)]
        local = [moment.astimezone(zone) for moment in utc]
        path = table([f"{when.isoformat()},{10 if when.hour == 18 else 1 + when.hour / 100}" for when in local])
        with pytest.raises(DataError, match="2021-03-28 01:00:00 in line 651 and 2021-03-28 03:00:00"):
            CSVProfiles(path).load("train")
        assert peaks(CSVProfiles(path, irregular="drop")) == {18}
        zulu = table([f"{when.isoformat()}Z,{10 if when.hour == 18 else 1 + when.hour / 100}" for when in HOURS])
        assert peaks(CSVProfiles(zulu)) == {18}

    @pytest.mark.parametrize("day", [15, 28, 29, 30, 31])
    def test_months_without_the_day_have_their_last_one(self, table, day):
        months = [(year, month + 1) for year in range(2000, 2006) for month in range(12)]
        rows = [f"{y}-{m:02d}-{min(day, calendar.monthrange(y, m)[1]):02d},{m}" for y, m in months]
        source = CSVProfiles(table(rows), length=12, label=None, test_fraction=0.5)
        assert len(source.load("train")) + len(source.load("test")) == 6

    @pytest.mark.parametrize("last_day", [False, True])
    def test_months_are_one_step(self, table, last_day):
        days = [(year, month + 1) for year in range(2000, 2020) for month in range(12)]
        rows = [
            f"{year}-{month:02d}-{calendar.monthrange(year, month)[1] if last_day else 1:02d},{month}"
            for year, month in days
        ]
        assert peaks(CSVProfiles(table(rows), length=12)) == {11}
        del rows[100]
        with pytest.raises(DataError, match=r"1 month\(s\); got 2008-04.* and 2008-06.* 1 missing"):
            CSVProfiles(table(rows), length=12).load("train")
        assert peaks(CSVProfiles(table(rows), length=12, irregular="drop")) == {11}

    def test_days_of_a_market_are_taken_as_they_follow(self, table):
        days = [datetime(2020, 1, 6) + timedelta(days=day) for day in range(700)]
        path = table([f"{day.date()},{day.weekday()}" for day in days if day.weekday() < 5])
        with pytest.raises(DataError, match="2020-01-10 .* and 2020-01-13 .*, 2 missing"):
            CSVProfiles(path, length=5).load("train")
        assert peaks(CSVProfiles(path, length=5, irregular="consecutive")) == {4}


#: What is done to a table, the settings, and what is said; an empty text where it is read as the plain one.
TABLES = {
    "semicolons": ({"rows": [row.replace(",", ";") for row in ROWS], "header": "date;load"}, {}, "delimiter: ';'"),
    "semicolons, told": (
        {"rows": [row.replace(",", ";") for row in ROWS], "header": "date;load"},
        {"delimiter": ";"},
        "",
    ),
    "tabs, told by a shell": (
        {"rows": [row.replace(",", "\t") for row in ROWS], "header": "date\tload"},
        {"delimiter": r"\t"},
        "",
    ),
    "byte order mark": ({"encoding": "utf-8-sig"}, {}, ""),
    "utf-16": ({"encoding": "utf-16"}, {}, "byte order mark of utf-16. .*encoding: utf-16"),
    "utf-16, told": ({"encoding": "utf-16"}, {"encoding": "utf-16"}, ""),
    "utf-16 without a mark": ({"encoding": "utf-16-le"}, {}, "with a NUL byte in line 1"),
    "latin-1": ({"header": "date,OT [°C]", "encoding": "latin-1"}, {}, "byte 0xb0 at offset 9, line 1"),
    "latin-1, told": ({"header": "date,OT [°C]", "encoding": "latin-1"}, {"encoding": "latin-1"}, ""),
    "unknown encoding": ({}, {"encoding": "ansi-x"}, "an encoding that Python knows; got 'ansi-x'"),
    "no text encoding": ({}, {"encoding": "hex"}, "an encoding that Python knows"),
    "long delimiter": ({}, {"delimiter": "::"}, "delimiter must be one character; got '::'"),
    "comments first": ({"before": "# from the sensor\n\n  \n# \n"}, {}, ""),
    "header in a comment": ({"header": "#date,load"}, {}, r"got 2021-03-01 .*after 1 blank or # lines"),
    "CRLF": ({"end": "\r\n"}, {}, ""),
    "CR": ({"end": "\r"}, {}, ""),
    "rows of nothing": ({"rows": [*ROWS, ",", "", ","]}, {}, ""),
    "blanks around names": ({"header": "date, load "}, {}, ""),
    "decomposed accents": ({"header": "date,cafe\u0301"}, {"variables": ["caf\u00e9"]}, ""),
    "column twice": ({"rows": [f"{row},1" for row in ROWS], "header": "date,load,load"}, {}, "load more than once"),
    "column without a name": ({"rows": [f"0,{row}" for row in ROWS], "header": ",date,load"}, {}, "1 without."),
    "no such column": ({"header": "time,load"}, {}, "got time, load. .*date is missing"),
    "short row": ({"rows": replaced(16, "2021-03-01 16:00:00")}, {}, "as the header, 2; got 1 in line 18"),
    "long row": ({"rows": replaced(16, f"{ROWS[16]},5")}, {}, "as the header, 2; got 3 in line 18"),
    "thousands": (
        {"rows": replaced(16, f'{HOURS[16]},"1,234.5"')},
        {},
        "written 1234.5; got '1,234.5' in line 18",
    ),
    "infinity": ({"rows": replaced(16, f"{HOURS[16]},inf")}, {}, "a finite number.*; got 'inf' in line 18"),
    "Python's numbers": ({"rows": replaced(16, f"{HOURS[16]},1_0")}, {}, "got '1_0' in line 18"),
    "words": ({"rows": replaced(16, f"{HOURS[16]},much")}, {}, "every value of load in .*; got 'much' in line 18"),
    "too large to tell": (
        {"rows": [*ROWS[:20], f"{HOURS[20]},1e308", f"{HOURS[21]},-1e308", *ROWS[22:]]},
        {},
        "load of .*, from -1e\\+308 to 1e\\+308",
    ),
    "NUL": ({"rows": replaced(20, "\0\0")}, {}, "a NUL byte in line 22"),
    "open quote": ({"rows": replaced(20, f'{HOURS[20]},"3')}, {}, "quotes that close.*, line 22 "),
    "very long field": ({"rows": replaced(20, f"{HOURS[20]},{'9' * 200_000}")}, {}, "an ordinary length.*, line 22 "),
    "nothing": ({"rows": [], "header": ""}, {}, "got no header"),
    "header only": ({"rows": []}, {}, "two profiles of 24 rows or more; got 0 rows"),
    "constant": ({"rows": [f"{when},1" for when in HOURS]}, {}, "a variable must vary.*from 1 to 1"),
    "unknown label": (
        {},
        {"label": "seasons"},
        "label .* one of season, .* variable or None; got 'seasons'",
    ),
    "unknown remedy": ({}, {"irregular": "dropp"}, "irregular .* one of refuse, drop, consecutive"),
    "no share": ({}, {"test_fraction": 1.0}, r"test_fraction .* in \(0, 1\); got 1.0"),
    "no length": ({}, {"length": 0}, "length .* at least 1; got 0"),
    "dates as values": ({}, {"variables": ["date"]}, "every value of date .* must be a finite number"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_or_said_to_be_wrong_in_one_line(name, table):
    changes, options, said = TABLES[name]
    path = table(**{"rows": ROWS, **changes})
    if said:
        with pytest.raises((DataError, ConfigurationError), match=said):
            message_of(lambda: CSVProfiles(path, **options).load("train"))
            CSVProfiles(path, **options).load("train")
    else:
        assert peaks(CSVProfiles(path, **options)) == {18}


def test_one_missing_value_among_two_columns_is_one(table):
    rows = [f"{row},{place % 7}" for place, row in enumerate(ROWS)]
    rows[40] = f"{HOURS[40]},1.5,nan"
    path = table(rows, "date,load,wind")
    said = message_of(lambda: CSVProfiles(path).load("train"))
    assert said.startswith(f"every value of wind in {path} must be a finite number")
    assert "got 'nan' in line 42" in said


@pytest.mark.parametrize("name", ["folder", "missing.csv", "a\0b", "~nobody_of_that_name/a.csv"])
def test_what_is_no_file_is_named(name, tmp_path):
    (tmp_path / "folder").mkdir()
    for reader in (CSVProfiles, lambda path: Interactions(path, num_items=3), AvailableClients):
        message_of(lambda reader=reader: reader(name).load("train"))


def test_home_is_where_the_user_means_it(table, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    table(ROWS)
    assert peaks(CSVProfiles("~/a.csv")) == {18}


class TestInteractions:
    @staticmethod
    def read(path, **options) -> Interactions:
        return Interactions(path, **{"num_items": 4, "min_user": 2, "min_item": 1, **options})

    def test_a_file_without_header_is_told_once_and_in_these_words(self, table):
        path = table(["1::661::3::978302109"], "1::1193::5::978300760")
        said = message_of(lambda: self.read(path).load("train"))
        assert said == (
            f"{path} must have the columns userId, movieId, rating; got 1::1193::5::978300760. The file has no "
            "header, or another separator: give it a header line, and separate fields by one character."
        )

    @pytest.mark.parametrize(
        ("rows", "options", "said"),
        [
            (["1,1,good,3", *PAIRS], {}, "every value of rating .*got 'good' in line 2"),
            (["1,1,nan,3", *PAIRS], {}, "every value of rating .*got 'nan' in line 2"),
            (["1,1,3,", *PAIRS], {"holdout": "latest"}, "every value of timestamp .*an empty field in line 2"),
            ([",1,3,3", *PAIRS], {}, "every value of userId .*an empty field in line 2"),
            ([f"{'7' * 5000},1,3,3", *PAIRS], {}, r"at most 200 characters; .*\(5000 characters\) in line 2"),
            ([*PAIRS, "1,2"], {}, "as the header, 4; got 2 in line 68"),
            (PAIRS, {"holdout": "lates"}, "holdout .* one of random, latest"),
            ([], {}, "got 0 such items"),
        ],
    )
    def test_broken_rows(self, rows, options, said, table):
        with pytest.raises((DataError, ConfigurationError), match=said):
            self.read(table(rows, RATINGS), **options).load("train")

    @pytest.mark.parametrize("before", ["-", "1" * 30])
    def test_ids_are_names(self, before, table):
        assert self.read(table([f"{before}{row}" for row in PAIRS], RATINGS)).load("train").x.shape == (11, 4)

    def test_excels_two_ways_to_write_text(self, table):
        plain = self.read(table(PAIRS, RATINGS)).load("train").x
        marked = self.read(table(PAIRS, RATINGS, encoding="utf-8-sig")).load("train").x
        tabs = [row.replace(",", "\t") for row in PAIRS]
        path = table(tabs, RATINGS.replace(",", "\t"), encoding="utf-16")
        with pytest.raises(DataError, match="byte order mark of utf-16"):
            self.read(path).load("train")
        told = self.read(path, encoding="utf-16", delimiter="\t").load("train").x
        assert plain.equal(marked)
        assert plain.equal(told)

    def test_a_catalogue_in_latin_1(self, table):
        ratings = table(PAIRS, RATINGS)
        films = [f"{item},Amélie {item}, War | Love" for item in range(1, 7)]
        path = table(films, "movieId,title,genres", encoding="latin-1", name="c.csv")
        with pytest.raises(
            DataError, match=r"catalogue must be a CSV file in utf-8; got .*byte 0xe9 at offset 25, line 2"
        ):
            self.read(ratings, catalogue=path).load("train")
        told = self.read(ratings, catalogue=path, encoding="latin-1")
        assert told.titles[0] == "Amélie 1"
        assert set(told.load("train").columns["genre"]) <= {"War", "Love"}

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (b"[" * 100_000, "RecursionError"),
            ('["é"]'.encode("latin-1"), "byte 0xe9 at offset 2, line 1 .* Save it as UTF-8[.]"),
            ('["a"]'.encode("utf-16"), "begins with the byte order mark of utf-16"),
            (b"[NaN]", "not a list of names"),
            (b"", "JSONDecodeError"),
        ],
    )
    def test_lists_of_items_that_are_none(self, text, said, table, tmp_path):
        (tmp_path / "items.json").write_bytes(text)
        with pytest.raises(DataError, match=said):
            self.read(table(PAIRS, RATINGS), items="items.json")


class TestTraces:
    HEADER = "client,first_round,last_round"

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ("0,0,9.5", "every value of last_round .* must be a whole number from 0; got '9.5' in line 2"),
            ("-1,0,9", "every value of client .*got '-1' in line 2"),
            ("0,1_0,20", "every value of first_round .*got '1_0'"),
            ("0,0," + "9" * 30, "a whole number from 0; got '9+'"),
            ("0,9,3", "last_round .* must be at least first_round, 9; got '3' in line 2"),
            ("0,1", "as the header, 3; got 2 in line 2"),
            ("", "a trace must say when some client is there; got no row"),
        ],
    )
    def test_broken_rows(self, row, said, table):
        with pytest.raises(DataError, match=said):
            AvailableClients(table([row], self.HEADER))

    def test_other_ways_to_write_it(self, table):
        spans = [(0, 0, 9), (3, 2, 4)]
        assert AvailableClients(table(["0,0,9", "3,2,4"], self.HEADER, encoding="utf-8-sig")).spans == spans
        path = table(["0;0;9", "3;2;4"], self.HEADER.replace(",", ";"), encoding="utf-16", before="# of May\n")
        with pytest.raises(DataError, match="AvailableClients.encoding: utf-16"):
            AvailableClients(path)
        with pytest.raises(DataError, match="set AvailableClients.delimiter: ';'"):
            AvailableClients(path, encoding="utf-16")
        assert AvailableClients(path, encoding="utf-16", delimiter=";").spans == spans


def test_lines_are_counted_through_quotes_and_comments(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('# one\n\na,b\n1,"x\ny"\n2,z\n')
    assert list(Table(path, option="data.source.path")) == [(4, ["1", "x\ny"]), (6, ["2", "z"])]
    assert np.array(Table(path, option="data.source.path").header).tolist() == ["a", "b"]
