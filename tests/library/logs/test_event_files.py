from pathlib import Path

from tensorboard.summary.writer.record_writer import RecordWriter

from downslope.logs.event_files import masked_checksum, records

DATA = [b"", b"one", bytes(range(256)) * 300]


def written(folder: Path) -> bytes:
    with (folder / "records").open("wb") as stream:
        writer = RecordWriter(stream)
        for data in DATA:
            writer.write(data)
        writer.flush()
    return (folder / "records").read_bytes()


def test_the_checksum_is_the_one_of_the_standard() -> None:
    crc32c = 0xE3069283  # of "123456789": RFC 3720, and every catalogue of checksums
    unmasked = (masked_checksum(b"123456789") - 0xA282EAD8) & 0xFFFFFFFF
    assert (unmasked << 15 | unmasked >> 17) & 0xFFFFFFFF == crc32c


def test_records_are_those_that_tensorboard_wrote(tmp_path: Path) -> None:
    assert list(records(written(tmp_path))) == DATA


def test_a_file_ends_at_the_first_record_that_is_not_whole(tmp_path: Path) -> None:
    content = written(tmp_path)
    ends = [16, 16 + 19, len(content)]  # a record takes 16 bytes beside its data
    for length in range(len(content) - 70_000):
        assert list(records(content[:length])) == DATA[: sum(end <= length for end in ends)]
    turned = bytearray(content)
    turned[16 + 12] ^= 1
    assert list(records(bytes(turned))) == DATA[:1]
    assert list(records(b"\xff" * 40)) == []
