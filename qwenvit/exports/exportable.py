"""The exporting methods of `Embeddings` and `ItemEmbeddings`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qwenvit.exports import checks, sglang, transformers, vllm

if TYPE_CHECKING:
    from qwenvit.outputs import ItemEmbeddings


class Exportable:
    """Hand embeddings to other programs, which neither check nor repair them.

    Every method raises ValueError, naming the item, where one was skipped, has NaN or infinity, or where its tokens or
    DeepStack features do not have the number that its grid gives or the width of the tower's config.
    """

    def _items_to_export(self) -> "Sequence[ItemEmbeddings]":
        raise NotImplementedError

    def check_receiver(self, config: Any, input_ids: Tensor | Sequence[Any] | None = None) -> None:
        """Check that a model takes these embeddings, and that its prompt has a placeholder for each token.

        Args:
            config: the model's config from transformers, or its dict, as in config.json.
            input_ids: `[batch, sequence]` or `[sequence]`, the prompt with its placeholders expanded. None: the program
                expands them from the grids itself, as vLLM does.

        Raises:
            TypeError: `config` is no config.
            ValueError: the embeddings are of another tower than the model's, or an item's number of placeholders is not
                its number of tokens: then the prompt was made for a picture of another size.
        """
        checks.check_receiver(self._items_to_export(), config, input_ids)

    def to_transformers(self) -> dict[str, Any]:
        """Return `mm_encoder_outputs` for `generate` and `forward`; written against transformers 5.23, works from 5.18.

        Call it anew for each `generate`, which with beams repeats the entries of its argument in place.

        Returns:
            `{"image": output}`, `{"video": output}` or both, on the device of the embeddings. `pooler_output` is a
            tuple with `[tokens, out_hidden_size]` for each item; `deepstack_features`, in families that have them, a
            list of such tuples, one for each level.
        """
        return transformers.to_transformers(self._items_to_export())

    def to_vllm(self) -> dict[str, dict[str, Any]]:
        """Return `multi_modal_data` for an engine with `enable_mm_embeds=True`; written against vLLM 0.32.

        With Qwen3-VL, leave the engine's limit of images above 0: without a tower, it ignores DeepStack.

        Returns:
            `{"image": {"image_embeds": …, "image_grid_thw": …}}`, the same of videos, or both, on the CPU. Embeddings
            are `[tokens, out_hidden_size · (1 + levels)]`, DeepStack joined to the tokens along the width; grids
            `[items, 3]`. Videos of Qwen3-VL and Qwen3.5 also have `timestamps`, those of Qwen2.5-VL and the Omni models
            `second_per_grid_ts`.

        Raises:
            ValueError: also a video without times, in the families that need them.
        """
        return vllm.to_vllm(self._items_to_export())

    def to_vllm_message(self) -> list[dict[str, Any]]:
        """Return content parts of a chat message for a server with `--enable-mm-embeds`; written against vLLM 0.32.

        Returns:
            One part for each item, of type `"image_embeds"` or `"video_embeds"`, with the fields of `to_vllm` in
            base64: of `.npy` without pickle; of `torch.save` for bfloat16, which `.npy` cannot store.

        Raises:
            ValueError: also a video without times, in the families that need them.
        """
        return vllm.to_vllm_message(self._items_to_export())

    def to_sglang(self) -> dict[str, list[dict[str, Any]]]:
        """Return arguments of `Engine.generate`; written against SGLang 0.5.23.

        Pass it `input_ids` with the placeholders expanded, which `check_receiver` checks.

        Returns:
            `{"image_data": [fields]}`, `{"video_data": [fields]}` or both, on the CPU. `precomputed_embeddings` are
            `[tokens, out_hidden_size · (1 + levels)]`, DeepStack joined to the tokens along the width; `image_grid_thw`
            or `video_grid_thw` `[items, 3]`. Videos of Qwen2.5-VL and the Omni models also have `second_per_grid_ts`.

        Raises:
            ValueError: also a video without times, in the families that need them.
        """
        return sglang.to_sglang(self._items_to_export())
