"""Each loss has its optimum where it should."""

import math

import torch

from revmux_vllm.training.losses import (
    UNLABELLED,
    answer_loss,
    info_nce,
    random_groups,
    stream_similarity,
    vector_loss,
)


def test_an_unlabelled_row_learns_from_the_backbone_alone() -> None:
    teacher = torch.tensor([[2.0, -1.0]])
    entropy = torch.distributions.Categorical(logits=teacher).entropy().item()
    own = answer_loss(teacher, torch.tensor([UNLABELLED]), teacher)
    assert math.isclose(own.item(), entropy, rel_tol=1e-5)
    right, wrong = (answer_loss(teacher, torch.tensor([i]), teacher) for i in (0, 1))
    assert right < own < wrong
    hard = answer_loss(teacher, torch.tensor([1]), teacher, label_share=1.0)
    assert math.isclose(hard.item(), -teacher.log_softmax(-1)[0, 1].item(), rel_tol=1e-5)


def test_vectors_are_compared_by_direction() -> None:
    vectors = torch.randn(5, 8)
    assert vector_loss(vectors, 3 * vectors).abs() < 1e-6
    assert vector_loss(vectors, -vectors) > 1.99


def test_info_nce_wants_each_vector_nearest_to_its_own_teacher() -> None:
    vectors = torch.eye(6)
    assert info_nce(vectors, vectors) < 1e-6
    assert info_nce(vectors, vectors.roll(1, 0)) > 10


def test_streams_are_compared_with_one_another_and_not_with_themselves() -> None:
    one = torch.randn(7, 1, 4)
    assert math.isclose(stream_similarity(one.expand(7, 3, 4)).item(), 1, rel_tol=1e-5)
    assert stream_similarity(torch.eye(4)[None, :3]) == 0
    assert stream_similarity(torch.zeros(2, 3, 4)) == 0


def test_random_groups_have_carriers_first_and_no_row_twice() -> None:
    lengths = torch.randint(1, 50, (34,))
    groups = random_groups(lengths, 4)
    assert len(set(groups.flatten().tolist())) == 32
    assert (lengths[groups][:, 0] == lengths[groups].amax(1)).all()
