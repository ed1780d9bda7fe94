"""`Bus`: copies between a device and its host, counted, and beside other work where the device has streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Bus:
    """The way between two memories.

    On a CUDA device copies run on a stream of their own, through pinned memory, so that the device computes meanwhile. Elsewhere, and so
    where a CPU stands for both sides, a copy is made at once.

    Attributes:
        to_host, to_device: bytes that went each way.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.to_host, self.to_device = device, 0, 0
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """New host memory of zeros, which copies can reach without a detour."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self._stream is not None)

    def fetch(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        """Begin to copy from the device to the host; what comes back waits for the copies and returns them."""
        self.to_host += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._stream is None:
            copies = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
            return lambda: copies
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor.detach(), non_blocking=True)
                tensor.record_stream(self._stream)
            done = self._stream.record_event()

        def ready() -> list[Tensor]:
            done.synchronize()
            return copies

        return ready

    def send(self, *tensors: Tensor) -> list[Tensor]:
        """Copy from the host to the device; later work there waits for it, this thread does not."""
        self.to_device += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._stream is None:
            return [tensor.to(self.device, copy=True) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            copies = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        current.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(current)
        return copies
