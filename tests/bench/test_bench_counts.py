"""FLOPs, bytes and waits of work whose numbers are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from imagen_kit.bench.counts import count, count_flops, least_bytes, size, weight_bytes
from imagen_kit.bench.subject import Subject

B, H, N, D = 2, 4, 64, 32
ATTENTION = 2 * 2 * B * H * N * N * D  # scores and their sum, a multiply-add being two


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_product_is_two_operations_for_each_of_its_multiplications(mode):
    with mode():
        a, b = torch.randn(6, 5), torch.randn(5, 7)
        counted = count(lambda: a @ b)
    assert counted.flops == 2 * 6 * 5 * 7
    assert counted.bytes == 4 * (6 * 5 + 5 * 7 + 6 * 7)


def test_linear_convolution_and_vectors():
    linear, convolution = nn.Linear(8, 3), nn.Conv2d(3, 8, 3, padding=1)
    x, picture, v = torch.randn(4, 8), torch.randn(2, 3, 10, 12), torch.randn(8)
    assert count_flops(lambda: linear(x)) == 2 * 4 * 8 * 3
    assert count_flops(lambda: convolution(picture)) == 2 * 2 * 8 * 3 * 9 * 10 * 12
    assert count_flops(lambda: x @ v) == 2 * 4 * 8
    assert count_flops(lambda: torch.einsum("nd,ed->ne", x, x)) == 2 * 4 * 4 * 8


def test_attention_is_counted_whichever_kernel_runs():
    q, k, v = (torch.randn(B, H, N, D) for _ in range(3))
    mask = torch.zeros(N, N)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == ATTENTION
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)) == ATTENTION
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == ATTENTION


def test_keys_of_another_number_and_width():
    q, k, v = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * 2 * 8 * 5 * (16 + 16)


def test_the_kits_formula_of_attention_is_that_of_its_products():
    from imagen_kit.bench.counts import _attention, _attention_backward

    q, k, v = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 12)
    with FlopCounterMode(display=False) as counter:
        (q @ k.transpose(-1, -2)).softmax(-1) @ v
    assert _attention(q, k, v) == counter.get_total_flops()
    assert _attention_backward(q, q, k, v) == counter.get_total_flops() * 5 // 2


def test_a_training_step_is_three_times_the_forward_pass_and_attention_three_and_a_half():
    q = torch.randn(B, H, N, D, requires_grad=True)
    forward = count_flops(lambda: F.scaled_dot_product_attention(q, q, q))
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == 3.5 * forward
    linear, x = nn.Linear(8, 3), torch.randn(4, 8, requires_grad=True)
    assert count_flops(lambda: linear(x).sum().backward()) == 3 * 2 * 4 * 8 * 3


@pytest.mark.parametrize("grad", [True, False])
def test_a_whole_network_agrees_with_torchs_own_counter(grad):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.SiLU(),
        nn.Flatten(2),
        nn.TransformerEncoderLayer(64, 4, 32, 0.0, batch_first=True),
    ).eval()
    x = torch.randn(2, 3, 8, 8)

    def run() -> None:
        with torch.set_grad_enabled(grad):
            out = network(x)
        if grad:
            out.sum().backward()

    ours = count_flops(run)
    torch.backends.mha.set_fastpath_enabled(False)  # torch's counter does not look into that one piece
    try:
        with FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert ours == counter.get_total_flops() > 0


def test_int8_products_are_counted():
    a, b = (torch.randint(-9, 9, (32, 32), dtype=torch.int8) for _ in range(2))
    assert count_flops(lambda: torch._int_mm(a, b)) == 2 * 32**3


def test_counting_leaves_the_fast_path_as_it_was():
    before = torch.backends.mha.get_fastpath_enabled()
    count(lambda: None)
    assert torch.backends.mha.get_fastpath_enabled() == before


class TestBytes:
    def test_a_copy_reads_and_writes(self):
        x = torch.randn(1000)
        assert count(x.clone).bytes == 2 * 4000

    def test_views_and_empty_memory_move_nothing(self):
        x = torch.randn(10, 10)
        assert count(lambda: (x.t()[:, 3], x.expand(7, 10, 10), x.detach(), torch.empty(10**6))).bytes == 0
        assert count(lambda: x.t().reshape(-1)).bytes == 2 * 400  # the one that has to be a copy

    def test_in_place_operations(self):
        x, y = torch.randn(100), torch.randn(100)
        assert count(lambda: x.add_(y)).bytes == 3 * 400
        assert count(lambda: x.copy_(y)).bytes == 2 * 400
        assert count(lambda: x.fill_(1.0)).bytes == 400

    def test_a_lookup_reads_only_what_it_answers(self):
        table, rows = torch.randn(1000, 8), torch.tensor([3, 5])
        assert count(lambda: F.embedding(rows, table)).bytes == 2 * (2 * 8 * 4) + 2 * 8

    def test_an_expanded_tensor_is_read_once(self):
        row = torch.randn(8).expand(100, 8)
        assert size(row) == 32
        assert count(lambda: row + 1).bytes == 32 + 100 * 8 * 4

    def test_half_precision_moves_half(self):
        x = torch.randn(100)
        assert count(x.bfloat16().clone).bytes * 2 == count(x.clone).bytes


def test_quantised_weights_take_the_bytes_of_their_parts():
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    subject = Subject()
    subject.modules = [layer]
    scales = 64 * 4
    assert weight_bytes(subject) == pytest.approx(
        64 * 64 + scales, abs=scales
    )  # scales and, it may be, zero points


class TestWaits:
    def test_reading_a_number_waits_where_the_tensor_is_followed(self):
        x = torch.randn(4)

        def run() -> float:
            return (x * 2 + 1).sum().item()

        assert count(run, [x]).waits == 1
        assert count(run).waits == 0

    def test_each_step_of_a_loop(self):
        x = torch.randn(4)

        def run() -> None:
            y = x
            for _ in range(5):
                y = y * 2
                if bool((y > 1e9).any()):
                    break

        assert count(run, [x]).waits == 5

    def test_activations_are_not_kept_alive(self):
        import weakref

        x, seen, alive = torch.randn(4), [], []

        def run() -> None:
            for _ in range(3):
                y = x * 2
                seen.append(weakref.ref(y))
                del y
                alive.append(sum(ref() is not None for ref in seen))

        count(run, [x])
        assert alive == [0, 0, 0]


class _Layered(Subject):
    def __init__(self):
        one = nn.Linear(4, 4)
        two = nn.Sequential(one, nn.BatchNorm1d(4))  # shares one's weights, has buffers of its own
        self.modules, self.inputs, self.passes = [one, two], [torch.zeros(3, 4)], 5


def test_weights_that_modules_share_count_once_and_are_read_in_every_pass():
    subject = _Layered()
    norm = 4 * (4 + 4 + 4 + 4) + 8  # weight, bias, mean, variance; how many batches it saw
    weights = 4 * (16 + 4) + norm
    assert weight_bytes(subject) == weights
    assert least_bytes(subject, torch.zeros(3, 4)) == 5 * weights + 2 * 48
    assert least_bytes(subject, None) == 5 * weights + 48


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tells_of_its_own_waits():
    from imagen_kit.bench.counts import count_sync_warnings

    x = torch.ones(4, device="cuda")
    assert count_sync_warnings(lambda: x * 2) == 0
    assert count_sync_warnings(lambda: [x.sum().item() for _ in range(3)]) == 3
    assert torch.cuda.get_sync_debug_mode() == 0
