"""M-RoPE positions of text-and-vision sequences."""

from torch import Tensor

from qwenvit.arguments import Impl
from qwenvit.ops import mrope_host
from qwenvit.ops.dispatch import use_triton


def rope_index(
    tokens: Tensor,
    image_token: int,
    video_token: int,
    mask: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    seconds: Tensor | None,
    scale: int,
    merge: int,
    frames_apart: bool,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the M-RoPE positions of each token. `qwenvit.rope_index` calls this with a family's rules.

    `qwenvit.rope_index` checks shapes, dtypes and devices, under the argument names that its callers know; this
    operation does not repeat those checks. `torch.compile` breaks its graph around the call.

    Args:
        tokens: `[B, S]` integers, token ids or token types.
        image_token: the value of `tokens` that marks image tokens.
        video_token: the value of `tokens` that marks video tokens.
        mask: `[B, S]`, nonzero for each token that counts; None if all count.
        image_grid_thw: `[images, 3]` integers: frame groups, rows and columns of patches, in order of appearance;
            None for no images.
        video_grid_thw: `[videos, 3]` integers: frame groups, rows and columns of patches, in order of appearance;
            None for no videos.
        seconds: `[videos]` seconds between a video's frame groups, of any real dtype; None for 1 each.
        scale: temporal positions per second.
        merge: patches merged into one token, along each side.
        frames_apart: whether text separates a video's frame groups, so that each starts like an image of its own.
        impl: `"triton"` does not check that grids and tokens match; `"reference"` raises ValueError unless they do.

    Returns:
        Positions `[3, B, S]` (temporal, height, width) and deltas `[B, 1]`, int64, on the device of `tokens`.

    Raises:
        ValueError: `tokens` is empty, or (with `"reference"`) the grids do not match the tokens.
    """
    if not tokens.numel():
        raise ValueError(f"tokens: expected at least one, got shape {list(tokens.shape)}")
    grids = (image_grid_thw, video_grid_thw)
    arguments = (tokens, image_token, video_token, mask, *grids, seconds, scale, merge, frames_apart)
    if not use_triton(impl, tokens):
        return mrope_host.host_rope_index(*arguments)
    from qwenvit.kernels.rope_index import launch_rope_index

    return launch_rope_index(*arguments)
