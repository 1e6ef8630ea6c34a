"""Run a rival's call in a CUDA graph."""

import torch

from common.tower_inputs import Outputs, TowerCall


def capture(call: TowerCall) -> TowerCall:
    """Capture a call in a CUDA graph; return a call that replays the graph and copies its results.

    The graph reads the tensors that `call` refers to, so the returned call keeps `call` alive.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = call()

    def replay(_: TowerCall = call) -> Outputs:  # the default keeps the call, and so the graph's inputs, alive
        graph.replay()
        return [output.clone() for output in outputs]

    return replay
