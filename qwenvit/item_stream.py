"""The images of a long job through an encoder, a batch at a time: what fails is told beside what does not."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar, Unpack

from qwenvit.busy_clock import BusyClock
from qwenvit.encoder import Encoder
from qwenvit.outputs import Embeddings
from qwenvit.pipeline import prefetch_on_stream
from qwenvit.preprocess.batching import PATCHES_PER_BATCH
from qwenvit.preprocess.decode import ImageInput
from qwenvit.preprocess.jpeg import Decoder
from qwenvit.preprocess.options import ImageOptions
from qwenvit.preprocess.prefetch import check_num_workers
from qwenvit.preprocess.prepared import Prepared

Item = TypeVar("Item")


@dataclass(frozen=True)
class EncodedBatch(Generic[Item]):
    """Consecutive items of a stream and their embeddings."""

    items: list[Item]
    embeddings: Embeddings
    """One entry for each item: None for one that failed, whose error is in `errors` by its position in this batch."""


def encode_stream(
    encoder: Encoder,
    items: Iterable[Item],
    open_item: Callable[[Item], ImageInput],
    *,
    num_workers: int | None = None,
    decode: Decoder = "pillow",
    max_patches: int | None = None,
    keep_patches: bool = False,
    clock: BusyClock | None = None,
    **options: Unpack[ImageOptions],
) -> Generator[EncodedBatch[Item]]:
    """Embed a stream of images in batches, and tell why one failed instead of stopping there.

    The next batch is queued on the GPU before a batch is yielded. The iterator may be closed at any time.

    Args:
        encoder: the encoder.
        items: what describes each image, such as its place in an archive. Drawn in the caller's thread, some ahead.
        open_item: turns an item into an image; called in the decoding threads. OSError, TypeError and ValueError that
            it raises are the item's errors.
        num_workers: threads that decode, as in `Encoder.encode`.
        decode: what decodes JPEG files, as in `Encoder.encode`.
        max_patches: most patches of a batch of several images. With 1 each image is embedded alone, so that its bits
            depend on it alone with every tower, and on a CPU on the number of torch's threads; see
            `Encoder.is_batch_invariant`. None: `PATCHES_PER_BATCH`.
        keep_patches: keep the last block's states, as in `Encoder.encode`.
        clock: adds up how long the device works.
        options: options of images, as in `Encoder.encode`.

    Raises:
        TypeError: an unknown option.
        ValueError: an impossible argument or option.
        OverflowError: the features exceed the range of float16.
    """
    workers = check_num_workers(num_workers)
    prepare = encoder.image_processor.preparer(encoder.device, decode, **options)
    waiting: deque[Item] = deque()

    def drawn() -> Iterator[Item]:
        for item in items:
            waiting.append(item)
            yield item

    def open_and_prepare(_: int, item: Item) -> Prepared:
        return prepare(None, open_item(item))

    def batches() -> Generator[EncodedBatch[Item]]:
        prefetched = prefetch_on_stream(encoder.device, drawn(), open_and_prepare, workers)
        most = PATCHES_PER_BATCH if max_patches is None else max_patches
        with closing(encoder.run_batches(prefetched, "keep", most, keep_patches=keep_patches, clock=clock)) as found:
            for embeddings in found:
                batch = list(islice(waiting, len(embeddings)))
                for _ in batch:
                    waiting.popleft()
                yield EncodedBatch(batch, embeddings)

    return batches()
