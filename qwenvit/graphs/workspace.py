"""Where cuBLAS' workspaces are in memory while CUDA graphs use them.

torch gives cuBLAS a workspace for each pair of a handle (one a thread) and a stream, and keeps it for later products.
The first capture that needs it allocates it in the pool of its graph. Later graphs of the same thread and stream write
to it too, in whichever pool they are. torch frees workspaces while others may use them: all of them when torch.compile
records CUDA graphs, and from torch 2.12 on a stream's when a graph of the stream is deleted. Memory that is freed in
the pool of a live graph stays there. Memory of a pool without graphs goes back to CUDA, and then to whoever asks next.

So workspaces come from pools of their own, one for each capture stream, which always have a graph.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenvit.graphs.capture import capturing

_owners = dict[int, torch.cuda.CUDAGraph]()
"""By capture stream: the first graph of the pool of its workspaces. torch has few streams, and hands them out again."""
_all_owners = set[torch.cuda.CUDAGraph]()
"""Those graphs, and those of pools that are not used any more, because a capture failed."""


def reserve_workspaces(stream: torch.cuda.Stream, weight: Tensor) -> torch.cuda.CUDAGraph:
    """Let torch allocate cuBLAS' and cuBLASLt's workspaces for this thread and stream, if it has none.

    The products are captured and never run, because graphs that use the workspaces may be running.

    Args:
        stream: the current stream, on which a graph will be captured next.
        weight: a tensor on the graph's device and of its dtype.

    Returns:
        A graph to keep until that capture is done: from torch 2.12 on, deleting it frees the stream's workspaces.
    """
    graph = torch.cuda.CUDAGraph()
    owner = _owners.pop(stream.cuda_stream, graph)  # put back after success: a pool may refuse captures after a failure
    with capturing(graph, None if owner is graph else owner.pool()):
        square = weight.new_empty(16, 16)
        F.linear(square, square)
        F.linear(square, square, square[0])  # cuBLASLt adds the bias
    _owners[stream.cuda_stream] = owner
    _all_owners.add(owner)
    return graph
