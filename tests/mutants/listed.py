"""The mistakes that `mutate.py` makes, each with the tests that should notice it."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One change: `before` occurs once in `function` of `file`, and becomes `after`."""

    file: str
    function: str
    before: str
    after: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        change = f"{' '.join(self.before.split())} -> {' '.join(self.after.split())}"
        return f"{self.file} {self.function}: {change}"


def _mutants(file: str, tests: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(file, *change, tuple(tests.split())) for change in changes]


MUTANTS = [
    *_mutants(
        "kernels/attention/hopper_consumer.py", "tests/kernels/test_hopper_on_cpu.py",
        ("consume", "> MAX_GROWTH, b_row_max, b_max)", "> 1e9, b_row_max, b_max)"),
        ("consume", "b_sums *= ", "_ = "),
        ("consume", "b_rest *= ", "_ = "),
        ("consume", "if I_CONSUMER == 0:", "if I_CONSUMER == 9:"),
        ("consume", " & (i_next_pair < pair_end - 1)", ""),
        ("consume", "if i_last_pair < pair_end - 1:", "if i_last_pair < pair_end - 5:"),
        ("_skip_pair", "_wait_for_pair(kv_full, i_pair)", "i_pair % STAGES"),
        ("_pass_turn", "(I_CONSUMER + 1)", "(I_CONSUMER + 2)"),
    ),
    *_mutants(
        "kernels/attention/pad_values.py", "tests/kernels/test_pad_values.py",
        ("_pad_with_ones", "other=1.0", "other=0.0"),
        ("_pad_with_ones", "o_channel < C", "o_channel <= C"),
    ),
    *_mutants(
        "kernels/attention/hopper_producer.py", "tests/kernels/test_hopper_on_cpu.py",
        ("produce", "if i_pair >= STAGES:", "if i_pair >= STAGES + 1:"),
        ("produce", "gl.maximum(i_pair - STAGES, 0)", "i_pair"),
        ("produce", "i_key + STEP_KEYS", "i_key"),
        ("produce", "(512 * n_segments <= S)", "(512 * n_segments > S)"),
    ),
    *_mutants(
        "qwenvit/graphs/graphed_tower.py", "tests/graphs/test_graphs_calls.py",
        ("GraphedTower._serialized", "stream.wait_event(self._last_call_done)", "pass"),
        ("GraphedTower._serialized", "self._last_call_done.record(stream)", "pass"),
        ("GraphedTower._encode", "with self._lock:", "if True:"),
    ),
    *_mutants(
        "qwenvit/graphs/graphed_tower.py", "tests/graphs/test_graphs_sharing.py",
        ("GraphedTower._encode", "self._graph_to_run(graph.capacity, layers)", "pass"),
        ("GraphedTower._graph_for", "self._graphs.move_to_end(key)", "pass"),
        ("GraphedTower._capture", "self._graphs.popitem(last=False)", "self._graphs.popitem()"),
    ),
    *_mutants(
        "qwenvit/graphs/graphed_tower.py", "tests/graphs/test_graphs_lifetimes.py",
        ("GraphedTower._encode", "if self._reset_if_weights_moved():", "if False:"),
        ("GraphedTower.serves", " and self._weights.on_gpu()", ""),
        ("GraphedTower._encode", "del graph", "pass"),
        ("GraphedTower.serves", "self._tower() is tower and ", ""),
        ("GraphedTower.__reduce__", "return type(None), ()", "return object.__reduce_ex__(self, 2)"),
    ),
    *_mutants(
        "qwenvit/graphs/graphed_tower.py", "tests/graphs/test_prepared_grids.py",
        ("GraphedTower._prepare", "grid.sizes or sizes_of(grid.tensor)", "grid.sizes"),
        ("GraphedTower._prepare", "self._prepared.popitem(last=False)", "self._prepared.popitem()"),
        ("GraphedTower._prepare", "grid.tensor.clone()", "grid.tensor"),
    ),
    *_mutants(
        "qwenvit/graphs/graphed_tower.py", "tests/graphs/test_capture.py",
        ("GraphedTower._graph_for", "with CAPTURE_LOCK, ", "with "),
        ("GraphedTower._graph_for", "self._pool_patches = 0", "pass"),
    ),
    *_mutants(
        "qwenvit/graphs/graphed_tower.py", "tests/graphs/test_warm_up.py",
        ("GraphedTower.warm_up", "next_size < patches + unit", "next_size < patches"),
    ),
    *_mutants(
        "qwenvit/graphs/graphed_tower.py", "tests/graphs/test_graphs_layers_host.py",
        ("GraphedTower._graph_key", "None, layers)", "None, ())"),
        ("GraphedTower._graph_to_run", "if key.layers == layers)", ")"),
        ("GraphedTower._graph_for", "if not self._pool_has_room_for(layers):", "if not self._graphs:"),
        ("GraphedTower._capture", "last_layer > self._deepest_run", "self._deepest_run < 0"),
    ),
    *_mutants(
        "qwenvit/graphs/graph.py", "tests/graphs/test_replay.py",
        ("Graph._launch", "if table is not self._host_table:", "if self._host_table is None:"),
        ("Graph._launch", "self._host_table = None", "pass"),
        ("Graph._launch", "self._input_rows.shape[0] != patches", "self._input_rows.shape[0] < patches"),
        ("Graph.__init__.run", "if i < len(copies) else", "if False else"),
        ("Graph.replay_states", ".index_select(0, index)", "[: len(index)]"),
    ),
    *_mutants(
        "qwenvit/graphs/capture.py", "tests/graphs/test_capture.py",
        ("garbage_collection_paused", "if enabled:", "if not enabled:"),
    ),
    *_mutants(
        "weights/recognise.py", "tests/weights/test_recognise.py",
        ("find_tower", "and not own.startswith(inner)", ""),
        ("find_tower", "None if is_adapter_name(name) else _SPLIT", "_SPLIT"),
        ("_is_under", 'name.partition(".")[0] in TOP_MODULES', "True"),
        ("_choose", "if len(best) == 1:\n        return best[0]", "if best:\n        return best[0]"),
    ),
    *_mutants(
        "weights/local.py", "tests/weights/test_local.py",
        ("find_vision_tensors", "found[0] if found[-1][1].missing else found[-1]", "found[0]"),
        ("load_tensors", "mapped.movedim(-1, 1).contiguous()", "mapped.reshape(expected[own])"),
        ("_fits", "return stored in (expected, channels_last)", "return sorted(stored) == sorted(expected)"),
    ),
    *_mutants(
        "weights/formats.py", "tests/weights/test_other_formats.py",
        ("refuse_other_format", "if head[4:8] == bytes(4):", "if False:"),
        ("quantisation_of", 'any(dtype.startswith("F8_") for dtype in weights)', "False"),
    ),
    *_mutants(
        "qwenvit/towers/checkpoint.py", "tests/from_pretrained/test_merged_adapters.py",
        ("load_tower", "merged.merge(tensors, vision.family)", "pass"),
        ("_with_adapter", "if adapter is False:", "if False:"),
    ),
    *_mutants(
        "qwenvit/towers/checkpoint.py", "tests/from_pretrained/test_checkpoint_configs.py",
        ("load_tower", "check_entries(entries, expected, vision.family)", "pass"),
    ),
    *_mutants(
        "qwenvit/towers/checkpoint.py", "tests/from_pretrained/test_save_pretrained.py",
        ("refuse_whole_checkpoint", ', ADAPTER_CONFIG', ""),
    ),
    *_mutants(
        "weights/hub/ranges.py", "tests/weights/test_ranges.py",
        ("_finished_chunks", "if lines[:1] != [plan]:", "if False:"),
        ("_finished_chunks", "if digest.hexdigest() == expected:", "if True:"),
        ("download", "(head, *chunks, *versions)", "(head, *chunks)"),
        ("download.fetch", "if written != chunk.length:", "if False:"),
        ("check_space", "disk.free + taken", "disk.free"),
    ),
    *_mutants(
        "weights/hub/reader.py", "tests/weights/test_ranges.py tests/weights/test_hub_reader.py",
        ("_RETRYABLE_STATUSES", "429, ", ""),
        ("HubReader._check_part", " or int(match[1]) != first", ""),
        ("HubReader._check_part", "if version.contradicts(known):", "if version.size != known.size:"),
        ("HubReader._check_answer", "if self._commit is not None and commit not in (None, self._commit):", "if False:"),
        ("StatusError", "while len(text) < MAX_ERROR_BYTES and", "while"),
        ("_Attempts", "self._stop.wait(max(wait, asked))", "self._stop.wait(wait)"),
    ),
    *_mutants(
        "weights/hub/session.py", "tests/weights/test_hub_reader.py",
        ("_received", "elif waited >= SPEED_WINDOW_S:", "elif False:"),
        ("_received", "waited, arrived = 0.0, 0\n        elif", "arrived = 0\n        elif"),
        ("_httpx_exchange", "stream=True, follow_redirects=False", "stream=True, follow_redirects=True"),
        ("_open", 'if urlsplit(target).scheme not in ("http", "https"):', "if False:"),
    ),
    *_mutants(
        "weights/header.py", "tests/weights/test_header.py",
        ("parse_header", "and file_size != position:", "and file_size < position:"),
        ("parse_header", "if entry.start != position:", "if entry.start < position:"),
        ("_parse_entry", "if bits >= 2**64:", "if False:"),
        ("_parse_entry", " and number >= 0", ""),
        ("_parse_entry", "type(number) is int", "isinstance(number, int)"),
        ("_check_metadata", "not isinstance(value, str)", "False"),
    ),
    *_mutants(
        "weights/strict_json.py", "tests/weights/test_strict_json.py tests/weights/test_header.py",
        ("parse_json", "if _SURROGATE.search(data):", "if False:"),
        ("_check_extent", "if depth > MAX_DEPTH:", "if False:"),
        ("_check_extent", '_STRING.sub(b"", data)', "data"),
        ("_unique", "if len(result) < len(pairs):", "if False:"),
        ("_integer", ' or digits == "-0"', ""),
    ),
    *_mutants(
        "weights/regular_file.py", "tests/weights/test_header.py tests/weights/test_index.py",
        ("open_regular", "kind = _kind(file.stat().st_mode)", 'kind = "regular file"'),
    ),
    *_mutants(
        "weights/index.py", "tests/weights/test_index.py",
        ("_is_plain_name", 'name not in ("", ".", "..") and ', ""),
        ("_is_plain_name", r'"/\\:\0"', r'"\\:\0"'),
    ),
    *_mutants(
        "weights/hub/fetch.py",
        "tests/weights/test_hub_refs.py tests/weights/test_hub.py tests/weights/test_hub_cache.py",
        ("_fetch", "cache.pinned_commit(revision) is None and ", ""),
        ("_fetch", "(differs or part.problem(snapshot) is not None)", "part.problem(snapshot) is not None"),
        ("_fetch", "pinned or cache.shared_commit(revision)", "pinned"),
        ("fetch_tower", "if needs_config and not (folder / CONFIG).is_file():", "if False:"),
    ),
    *_mutants(
        "weights/hub/cache.py", "tests/weights/test_hub_refs.py tests/weights/test_hub_cache.py",
        ("replace_file", "os.replace(temporary, file)", "file.write_bytes(temporary.read_bytes())"),
        ("_below", "if not is_commit(commit):", "if False:"),
        ("is_commit", "_COMMIT.fullmatch(revision)", "_COMMIT.match(revision)"),
    ),
    *_mutants(
        "weights/hub/repository.py", "tests/weights/test_hub_hostile.py",
        ("_files_of", ' or {"", ".", ".."} & {*re.split(r"[/\\\\]", name)}', ""),
        ("_commit_of", "if not is_commit(commit):", "if commit is None:"),
        ("Repository", "if is_commit(revision) and self.commit != revision:", "if False:"),
        ("Repository.read", "elif file.git_sha1 not in (None, git.hexdigest()):", "elif False:"),
        ("Repository.sha256", "listed or (None if version is None else version.sha256)", "listed"),
    ),
    *_mutants(
        "weights/hub/tower.py", "tests/weights/test_hub_hostile.py tests/weights/test_hub_subfolders.py",
        ("_refuse_giant", "if nbytes > MAX_BYTES:", "if False:"),
        ("_check_hash", "incomplete.unlink()\n        raise", "raise"),
        ("download_tower", "_check_whole_shard(repository, name, tensors, incomplete)", "pass"),
        ("download_adapter", "_check_hash(repository, ADAPTER_FILE, digest.hexdigest(), incomplete)", "pass"),
    ),
    *_mutants(
        "weights/save.py", "tests/weights/test_save.py",
        ("write_safetensors", "os.replace(temporary, target)", "target.write_bytes(temporary.read_bytes())"),
        ("write_safetensors", "secrets.token_hex(8)", "os.getpid()"),
        ("write_safetensors", "temporary.unlink(missing_ok=True)", "pass"),
        ("write_safetensors", "os.fsync(stream.fileno())", "pass"),
    ),
    *_mutants(
        "qwenvit/preprocess/resize.py", "tests/preprocess/test_image_processor.py",
        ("smart_resize", "if area > max_pixels:", "if area >= max_pixels:"),
        ("smart_resize", "elif area < min_pixels:", "elif area <= min_pixels:"),
    ),
    *_mutants(
        "qwenvit/preprocess/batching.py", "tests/preprocess/test_batching.py",
        ("batches", "patches + more_patches > max_patches", "patches + more_patches >= max_patches"),
        ("batches", "num_bytes + more_bytes > max_bytes", "num_bytes + more_bytes >= max_bytes"),
        ("batches", "len(batch) == IMAGES_PER_BATCH", "False"),
    ),
    *_mutants(
        "qwenvit/preprocess/prefetch.py", "tests/preprocess/prefetch/test_prefetch_ahead.py",
        ("prefetch", "ready_bytes -= ready.pop(index)", "ready.pop(index)"),
        ("prefetch", "and ready_bytes < MAX_READY_BYTES", ""),
        ("prefetch", "threads.unfinished < 2 * num_workers", "True"),
        ("prefetch", "                    collect(0)\n", ""),
    ),
    *_mutants(
        "qwenvit/preprocess/prefetch.py", "tests/preprocess/prefetch/test_prefetch_outcomes.py",
        ("prefetch", "if source_failed:", "if False:"),
    ),
    *_mutants(
        "qwenvit/preprocess/threads.py", "tests/preprocess/prefetch/test_prefetch_outcomes.py",
        ("Threads.add", "_thread.start_new_thread(self._start, (thread,))", "thread.start()"),
        ("Threads.add", "min(self.unfinished, self._count)", "self._count"),
        ("Threads._start", "self._run()", "pass"),
    ),
    *_mutants(
        "qwenvit/preprocess/threads.py", "tests/preprocess/prefetch/test_prefetch_endings.py",
        ("Threads.end", "self._tasks.put(None)", "pass"),
        ("Threads._run", "self._tasks.put(None)", "pass"),
        ("Threads._next_task", "while not self._is_abandoned():", "while True:"),
        ("Threads._next_task", "self._interpreter_ends = True", "pass"),
        ("Threads._is_abandoned", "self._owner.daemon or ", ""),
        ("Threads._is_abandoned", " and (self._owner.daemon or not self._owner.is_alive())", ""),
        ("Threads._look_after", "if self._interpreter_ends:", "if False:"),
    ),
    *_mutants(
        "qwenvit/preprocess/prefetch.py", "tests/encode/test_encode_memory.py",
        ("prefetch", "source_failed.pop()", "source_failed[0]"),
    ),
    *_mutants(
        "qwenvit/pipeline.py", "tests/encode/test_encode_memory.py",
        ("run_batches", "failed.pop()", "failed[0]"),
    ),
    *_mutants(
        "qwenvit/ops/attention.py", "tests/kernels/test_checks.py",
        ("_passes_fast_check", "(v.shape == shape or ", "(True or "),
        ("_passes_fast_check", "q.stride(2) == k.stride(2) == v.stride(2) == 1", "q.stride(2) == k.stride(2) == 1"),
    ),
    *_mutants(
        "kernels/attention/dispatch.py", "tests/kernels/test_rope_attention.py",
        ("rope_attention", "cos.stride() != sin.stride()", "False"),
    ),
    *_mutants(
        "qwenvit/integrations/vllm/attention.py", "tests/integrations/vllm/test_vllm_attention.py",
        ("use_attention", "if config.is_full_attention(number)", "if number % 2"),
        ("_RopeAttention.forward", 'if hasattr(self, "split_qkv"):', "if False:"),
        ("_check_attention", 'if backend == "FLASHINFER":', "if False:"),
    ),
    *_mutants(
        "qwenvit/ops/dispatch.py", "tests/kernels/test_checks.py",
        ("use_triton", "for x in tensors)", "for x in tensors[:1])"),
    ),
    *_mutants(
        "qwenvit/ops/packing.py", "tests/kernels/test_mlp.py tests/towers/test_fast_tower.py",
        ("pack_gate_up", "if gate_weight.shape != up_weight.shape:", "if False:"),
    ),
    *_mutants(
        "qwenvit/ops/packing.py", "tests/kernels/test_qkv_rope.py",
        ("unpack_qkv_rows", ".argsort()", ""),
    ),
    *_mutants(
        "kernels/gemm/qkv_rope.py", "tests/kernels/test_qkv_rope.py",
        ("_rotate_in_place", "i_chunk == N_CHUNKS - 1", "i_chunk == N_CHUNKS"),
        ("_rotate_in_place", "o_one < H * (V_WIDTH - D)", "o_one <= H * (V_WIDTH - D)"),
    ),
    *_mutants(
        "qwenvit/towers/attention.py", "tests/towers/test_vision_attention.py",
        ("VisionAttention.pack", "if len(rows) != expected:", "if len(rows) < expected:"),
    ),
    *_mutants(
        "qwenvit/towers/fast.py", "tests/towers/test_fast_tower.py",
        ("refuse_gradients", " and any(", " and all("),
    ),
    *_mutants(
        "qwenvit/plan/inputs.py", "tests/plan/test_grid_plan.py",
        ("_count_patches_cached", ".reshape(-1, 3), spatial_merge_size)", ".reshape(-1, 3), 2)"),
    ),
    *_mutants(
        "qwenvit/pipeline.py", "tests/test_encoder_hazards.py",
        ("_hand_over", "_refuse_overflow(output.tensors)", "_refuse_overflow(output.tensors[:1])"),
    ),
    *_mutants(
        "qwenvit/encoder.py", "tests/test_encoder.py",
        ("Encoder.__init__", ', ("video", self.video_processor))', ",)"),
    ),
    *_mutants(
        "qwenvit/parity.py", "tests/towers/test_fast_tower.py",
        ("record.record_input", 'kwargs["hidden_states"]).clone()', 'kwargs["hidden_states"])'),
    ),
    *_mutants(
        "qwenvit/mrope/rules.py", "tests/mrope/test_rope_index.py",
        ("PUBLISHED_RULES", "tokens_per_second=2", "tokens_per_second=1"),
    ),
    *_mutants(
        "qwenvit/exports/checks.py", "tests/exports/test_export_checks.py",
        ("check_items", "if not layer.isfinite().all():", "if False:"),
        ("_check_placeholders", "if left := sum(runs):", "if left := 0:"),
    ),
    *_mutants(
        "qwenvit/datasets/find.py", "tests/datasets/test_find.py",
        ("Records._kind", "os.path.basename(candidate.path).lower()", "os.path.basename(candidate.path)"),
        ("Records._survey", "if not names.add(unicode_name(candidate.name)):", "if False:"),
    ),
    *_mutants(
        "qwenvit/datasets/files.py", "tests/datasets/test_files.py",
        ("_entries", "names.sort()", "pass"),
        ("_name_matches", '(name[0] != "." or pattern[0] == ".")', "True"),
    ),
    *_mutants(
        "qwenvit/datasets/archives.py", "tests/datasets/test_archives.py",
        ("_members", "if blocks.last != bytes(tarfile.BLOCKSIZE):", "if False:"),
        ("read_archive", 'f"{archive_stamp}-{member.offset_data}"', "archive_stamp"),
    ),
    *_mutants(
        "qwenvit/datasets/tables.py", "tests/datasets/test_tables.py",
        ("_content", 'if cell.get("bytes") is None else', 'if not cell.get("bytes") else'),
    ),
    *_mutants(
        "qwenvit/cli/single_file.py", "tests/cli/test_encode_file.py",
        ("_publish", "if encoded < existing:", "if False:"),
    ),
    *_mutants(
        "qwenvit/pooling.py", "tests/test_pooling.py",
        ("_sums", "* (size % CHUNK_ROWS > 0)", "* (size % CHUNK_ROWS > 1)"),
        ("mean_of_items", "_sums(rows.float(), sizes)", "_sums(rows, sizes)"),
    ),
    *_mutants(
        "qwenvit/outputs.py", "tests/test_pooling.py",
        ("Embeddings.pooled", "sizes // self.config.merge_unit", "sizes // 1"),
        ("Embeddings.concatenate", "errors |= {start + position: error", "errors |= {position: error"),
    ),
    *_mutants(
        "qwenvit/busy_clock.py", "tests/encode/test_item_stream.py",
        ("BusyClock.on_host", "self._seconds += ", "self._seconds = "),
    ),
    *_mutants(
        "qwenvit/datasets/formats/safetensors.py", "tests/datasets/test_shard_formats.py",
        ("SafetensorsShard.finish", "padding := -self._written % 4", "padding := 0"),
        ("SafetensorsShard.finish", "self._written if self._layout.has_tokens else 0", "0"),
        ("SafetensorsShard._move", "range(self._written, 0, -BLOCK)", "range(self._written, BLOCK, -BLOCK)"),
        ("SafetensorsShard._grow", "min(foreseen + foreseen // 4, self._written // 8)", "0"),
        ("SafetensorsShard._move", "-(-reserve // ALIGNMENT) * ALIGNMENT", "reserve + 1"),
    ),
    *_mutants(
        "qwenvit/datasets/formats/parquet.py", "tests/datasets/test_shard_formats.py",
        ("row_of", "item.pooled.numpy().copy()", "item.pooled.numpy()"),
        ("row_of", "bytes(bytes_of(item.tokens))", "bytes_of(item.tokens)"),
    ),
    *_mutants(
        "qwenvit/datasets/formats/npy.py", "tests/datasets/test_shard_formats.py",
        ("NpyShard.finish", "(HEAD_BYTES - 10)", "(HEAD_BYTES - 9)"),
    ),
    *_mutants(
        "qwenvit/datasets/shard_folder.py", "tests/datasets/test_job_kill.py",
        ("ShardFile.finish", "publish(self._index)\n        publish(self._shard)",
         "publish(self._shard)\n        publish(self._index)"),
        ("drop_unfinished", 'if not (folder / f"{stem}{suffix}").exists():', "if False:"),
    ),
    *_mutants(
        "qwenvit/datasets/signals.py", "tests/datasets/test_job_kill.py",
        ("StopSignals._handle", "elif signum == signal.SIGINT:", "elif False:"),
    ),
    *_mutants(
        "qwenvit/datasets/ledger.py", "tests/datasets/test_job_again.py",
        ("Ledger.begin", "manifest.check_settings(resolved.settings)", "pass"),
        ("Ledger.undone", "elif self._done.has_id(record.id):", "elif False:"),
        ("Ledger.end", "self._failures.end_of_inputs()", "pass"),
    ),
    *_mutants(
        "qwenvit/datasets/shard_stream.py", "tests/datasets/test_job.py tests/datasets/test_job_disk.py",
        ("ShardStream._write", "self._bytes + item.num_bytes", "self._bytes"),
        ("ShardStream._fail", "self._file.abandon()", "pass"),
    ),
    *_mutants(
        "qwenvit/datasets/embed.py", "tests/datasets/test_job.py",
        ("copy_batch", "row + 1", "row"),
        ("copy_batch", "first + size, row", "first, row"),
    ),
    *_mutants(
        "qwenvit/datasets/image_batches.py", "tests/datasets/test_job_errors.py",
        ("embed_in_batches", "pending.append(record)", "pass"),
        ("embed_in_batches", "for _ in batch.items:", "for _ in ():"),
    ),
    *_mutants(
        "qwenvit/datasets/lock.py", "tests/datasets/test_job_lock.py",
        ("_try_lock", "return False", "return True"),
    ),
    *_mutants(
        "qwenvit/features/attention_maps.py", "tests/features/test_attention_maps.py",
        ("_softmax", ".mul_(scale)", ""),
        ("_fill", "block.norm1(x)", "x"),
        ("_fill", "transpose(0, 1).float()", "transpose(0, 1)"),
        ("attention_maps", "tower.segments_of(block, plan)", "plan.frames"),
        ("attention_maps", "places = order.argsort()", "places = order"),
    ),
    *_mutants(
        "qwenvit/preprocess/image_processor.py", "tests/preprocess/test_differentiable.py",
        ("ImageProcessor._differentiable", ", detach=False", ""),
        ("ImageProcessor.unpatchify", "item.mean(0)", "item[0]"),
    ),
    *_mutants(
        "qwenvit/ops/reference.py", "tests/preprocess/test_differentiable.py",
        ("join_patches", '"h": rows // merge_size, "w": columns', '"h": columns // merge_size, "w": rows'),
    ),
    *_mutants(
        "qwenvit/towers/reference.py", "tests/features/test_gradients.py",
        ("ReferenceTower.apply_block", "self.gradient_checkpointing and", "False and"),
    ),
    *_mutants(
        "qwenvit/plan/reading_order.py", "tests/plan/test_reading_order.py",
        ("reading_order", "window_index.argsort()", "window_index"),
        ("reading_order", "+ row * widths[frame] + column", "+ column * heights[frame] + row"),
        ("reading_order", "if by_token:", "if not by_token:"),
    ),
    *_mutants(
        "qwenvit/towers/hidden_states.py", "tests/features/test_maps.py",
        ("iter_hidden_states", "range(max(layers) + 1)", "range(max(layers) + 2)"),
        ("ordered_hidden_states", "refuse_gradients(", "id("),
    ),
    *_mutants(
        "qwenvit/features/maps.py", "tests/features/test_maps.py",
        ("MapRequest.items", "start = end", "start += 0"),
        ("MapRequest.cells", "tower.merger.norm(state) if self.norm", "tower.merger.norm(state) if False"),
        ("_mean_of_tokens", "total / merge_unit", "total / len(others)"),
        ("check_layers", "depth + 1", "depth"),
    ),
    *_mutants(
        "qwenvit/features/encoder_methods.py", "tests/features/test_maps.py",
        ("DenseFeatures._feature_batches", "for position in output.skipped:", "for position in ():"),
        ("DenseFeatures.features_of_video", "is_video=True", "is_video=False"),
    ),
    *_mutants(
        "qwenvit/features/pictures.py", "tests/features/test_pictures.py",
        ("pca_pictures", "scatter += centred.T", "scatter = centred.T"),
        ("pca_pictures", "@ directions for one", "@ directions.flip(1) for one"),
        ("similarity_pictures", "low, high = min(one.min()", "low, high = min(one.max()"),
    ),
    *_mutants(
        "qwenvit/cli/picture.py", "tests/cli/test_picture.py",
        ("_column", "maps[0][query]", "maps[-1][query]"),
        ("_query", "y * rows // height, x * columns // width", "x * columns // width, y * rows // height"),
    ),
    *_mutants(
        "qwenvit/program.py", "tests/test_program.py",
        ("TowerProgram.__init__", "self.plan = _replace_leaves(plan, Tensor, keep)", "self.plan = plan"),
        ("_without_unused", "if request.norm:", "if True:"),
    ),
    *_mutants(
        "qwenvit/integrations/timm.py", "tests/integrations/test_timm.py",
        ("TimmModel.forward_intermediates", "[layer + 1 for layer in layers]", "layers"),
        ("TimmModel.forward_intermediates", "max(blocks) if stop_early else depth - 1", "depth - 1"),
        ("TimmModel._maps", "x.repeat_interleave(config.temporal_patch_size, dim=0)", "x.repeat(2, 1, 1, 1)"),
    ),
]  # fmt: skip
