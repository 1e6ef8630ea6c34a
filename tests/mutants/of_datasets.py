"""Mistakes in jobs over data sets."""

from mutants.mutant import mutants

MUTANTS = [
    *mutants(
        "qwenvit/datasets/find.py",
        "tests/datasets/test_find.py",
        ("Records._kind", "os.path.basename(candidate.path).lower()", "os.path.basename(candidate.path)"),
        ("Records._survey", "if not names.add(unicode_name(candidate.name)):", "if False:"),
    ),
    *mutants(
        "qwenvit/datasets/files.py",
        "tests/datasets/test_files.py",
        ("_entries", "names.sort()", "pass"),
        ("_name_matches", '(name[0] != "." or pattern[0] == ".")', "True"),
    ),
    *mutants(
        "qwenvit/datasets/archives.py",
        "tests/datasets/test_archives.py",
        ("_members", "if blocks.last != bytes(tarfile.BLOCKSIZE):", "if False:"),
        ("read_archive", 'f"{archive_stamp}-{member.offset_data}"', "archive_stamp"),
    ),
    *mutants(
        "qwenvit/datasets/tables.py",
        "tests/datasets/test_tables.py",
        ("_content", 'if cell.get("bytes") is None else', 'if not cell.get("bytes") else'),
    ),
    *mutants(
        "qwenvit/cli/single_file.py",
        "tests/cli/test_encode_file.py",
        ("_publish", "if encoded < existing:", "if False:"),
    ),
    *mutants(
        "qwenvit/datasets/formats/safetensors.py",
        "tests/datasets/test_shard_formats.py",
        ("SafetensorsShard.finish", "padding := -self._written % 4", "padding := 0"),
        ("SafetensorsShard.finish", "self._written if self._layout.has_tokens else 0", "0"),
        ("SafetensorsShard._move", "range(self._written, 0, -BLOCK)", "range(self._written, BLOCK, -BLOCK)"),
        ("SafetensorsShard._grow", "min(foreseen + foreseen // 4, self._written // 8)", "0"),
        ("SafetensorsShard._move", "-(-reserve // ALIGNMENT) * ALIGNMENT", "reserve + 1"),
    ),
    *mutants(
        "qwenvit/datasets/formats/parquet.py",
        "tests/datasets/test_shard_formats.py",
        ("row_of", "item.pooled.numpy().copy()", "item.pooled.numpy()"),
        ("row_of", "bytes(bytes_of(item.tokens))", "bytes_of(item.tokens)"),
    ),
    *mutants(
        "qwenvit/datasets/formats/npy.py",
        "tests/datasets/test_shard_formats.py",
        ("NpyShard.finish", "(HEAD_BYTES - 10)", "(HEAD_BYTES - 9)"),
    ),
    *mutants(
        "qwenvit/datasets/shard_folder.py",
        "tests/datasets/test_job_kill.py",
        (
            "ShardFile.finish",
            "publish(self._index)\n        publish(self._shard)",
            "publish(self._shard)\n        publish(self._index)",
        ),
        ("drop_unfinished", 'if not (folder / f"{stem}{suffix}").exists():', "if False:"),
    ),
    *mutants(
        "qwenvit/datasets/signals.py",
        "tests/datasets/test_job_kill.py",
        ("StopSignals._handle", "elif signum == signal.SIGINT:", "elif False:"),
    ),
    *mutants(
        "qwenvit/datasets/ledger.py",
        "tests/datasets/test_job_again.py",
        ("Ledger.begin", "manifest.check_settings(resolved.settings)", "pass"),
        ("Ledger.undone", "elif self._done.has_id(record.id):", "elif False:"),
        ("Ledger.end", "self._failures.end_of_inputs()", "pass"),
    ),
    *mutants(
        "qwenvit/datasets/shard_stream.py",
        "tests/datasets/test_job.py tests/datasets/test_job_disk.py",
        ("ShardStream._write", "self._bytes + item.num_bytes", "self._bytes"),
        ("ShardStream._fail", "self._file.abandon()", "pass"),
    ),
    *mutants(
        "qwenvit/datasets/embed.py",
        "tests/datasets/test_job.py",
        ("copy_batch", "row + 1", "row"),
        ("copy_batch", "first + size, row", "first, row"),
    ),
    *mutants(
        "qwenvit/datasets/image_batches.py",
        "tests/datasets/test_job_errors.py",
        ("embed_in_batches", "pending.append(record)", "pass"),
        ("embed_in_batches", "for _ in batch.items:", "for _ in ():"),
    ),
    *mutants(
        "qwenvit/datasets/lock.py",
        "tests/datasets/test_job_lock.py",
        ("_try_lock", "return False", "return True"),
    ),
]
