"""Losses of preferences, policies and distillation: against PyTorch's figures, and against plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.training.losses import logits, policies, preferences
from hovle_jax.training.losses.preferences import Answers, Preference
from hovle_jax.training.losses.tokens import divide
from tests.shared import golden

TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def cases(kind):
    """[(name, {key: array})] of a kind; the file may have any number."""
    found = np.load(golden("preference-loss") / "expected.npz")
    grouped = {}
    for name in found.files:
        case, _, key = name.partition(".")
        if case.rstrip("0123456789") == kind:
            grouped.setdefault(case, {})[key] = found[name]
    assert grouped
    return grouped.items()


# By the names of the golden file -> our loss.
DPO = {
    "sigmoid": ("sigmoid", False), "sigmoid_smoothed": ("sigmoid", True), "robust": ("robust", True),
    "hinge": ("hinge", False), "ipo_sum": ("ipo_sum", False), "ipo_mean": ("ipo", False),
}  # fmt: skip


@pytest.mark.parametrize("variant", DPO)
def test_losses_of_pairs_and_their_gradients(variant):
    name, smoothed = DPO[variant]
    for _, case in cases("dpo"):
        how = Preference(float(case["beta"]), float(case["label_smoothing"]) if smoothed else 0.0)

        def losses(chosen, rejected):
            chosen = Answers(chosen, case["ref_chosen"], case["len_chosen"])
            return preferences.LOSSES[name](chosen, Answers(rejected, case["ref_rejected"], case["len_rejected"]), how)

        given = jnp.asarray(case["policy_chosen"]), jnp.asarray(case["policy_rejected"])
        np.testing.assert_allclose(losses(*given), case[f"{variant}.losses"], **TOLERANCE)
        grads = jax.grad(lambda *given: jnp.mean(losses(*given)), argnums=(0, 1))(*given)
        for grad, side in zip(grads, ("chosen", "rejected")):
            np.testing.assert_allclose(grad, case[f"{variant}.grad_policy_{side}"], **TOLERANCE)
        gains = {
            s: Answers(case[f"policy_{s}"], case[f"ref_{s}"], case[f"len_{s}"]).gain for s in ("chosen", "rejected")
        }
        for side, gain in gains.items():
            np.testing.assert_allclose(how.beta * gain, case[f"{side}_rewards"], **TOLERANCE)
        assert np.mean(gains["chosen"] > gains["rejected"]) == pytest.approx(float(case["reward_accuracy"]))


def test_orpo_from_logits():
    for _, case in cases("orpo"):
        labels = np.asarray(case["labels"])[:, 1:]
        there = labels != -100
        lengths, pairs = there.sum(1), len(labels) // 2

        def parts(logits):
            logps = jax.nn.log_softmax(logits[:, :-1])
            found = jnp.take_along_axis(logps, np.where(there, labels, 0)[..., None], axis=2)[..., 0] * there
            sums = found.sum(1)
            of = lambda rows: Answers(sums[rows], jnp.zeros(pairs), lengths[rows])
            chosen, rejected = of(slice(pairs)), of(slice(pairs, None))
            losses = preferences.orpo(chosen, rejected, Preference(float(case["beta"])))
            nll = -found[:pairs].sum() / there[:pairs].sum()
            return sums, nll, losses, nll + jnp.mean(losses)

        sums, nll, losses, loss = parts(jnp.asarray(case["logits"]))
        np.testing.assert_allclose(sums, case["sum_logps"], **TOLERANCE)
        np.testing.assert_allclose(sums / lengths, case["mean_logps"], **TOLERANCE)
        np.testing.assert_allclose(nll, case["nll"], **TOLERANCE)
        np.testing.assert_allclose(losses, -case["ratio_term"], **TOLERANCE)
        np.testing.assert_allclose(loss, case["loss"], **TOLERANCE)
        grad = jax.grad(lambda logits: parts(logits)[3])(jnp.asarray(case["logits"]))
        np.testing.assert_allclose(grad, case["grad_logits"], **TOLERANCE)


def test_a_reward_model():
    for _, case in cases("reward_model"):
        given = jnp.asarray(case["chosen"]), jnp.asarray(case["rejected"])
        loss = lambda *given, **how: jnp.mean(preferences.reward_model(*given, **how))
        np.testing.assert_allclose(loss(*given), case["loss"], **TOLERANCE)
        np.testing.assert_allclose(loss(*given, margin=case["margin"]), case["loss_margin"], **TOLERANCE)
        centred = loss(*given, centering=float(case["center_coefficient"]))
        np.testing.assert_allclose(centred, case["loss_centered"], **TOLERANCE)
        for grad, side in zip(jax.grad(loss, argnums=(0, 1))(*given), ("chosen", "rejected")):
            np.testing.assert_allclose(grad, case[f"grad_{side}"], **TOLERANCE)


def test_ppo_from_log_probabilities_to_its_loss():
    for _, case in cases("ppo"):
        setting = lambda name: case[f"setting.{name}"].item()
        actions, valued = case["action_mask"], case["value_mask"]
        logps = jnp.where(actions, case["logprobs"], 1.0)
        reference, values = jnp.where(actions, case["ref_logprobs"], 1.0), jnp.where(valued, case["values"], 0.0)
        penalties = setting("kl_coef") * policies.kl(logps, reference, setting("kl_estimator"))
        rewards = policies.token_rewards(jnp.asarray(case["scores"]), penalties, jnp.asarray(case["last_index"]))
        np.testing.assert_allclose(rewards, case["rewards"], **TOLERANCE)
        if setting("whiten_rewards"):
            rewards = jnp.where(valued, policies.whitened(rewards, valued, keep_mean=True), 0.0)
        np.testing.assert_allclose(rewards, case["rewards_used"], **TOLERANCE)
        raw = policies.generalized_advantages(rewards, values, setting("gamma"), setting("lam"))
        np.testing.assert_allclose(
            jnp.where(actions, raw, 0), np.where(actions, case["advantages_raw"], 0), **TOLERANCE
        )
        np.testing.assert_allclose(raw + values, case["returns"], **TOLERANCE)
        advantages = jnp.where(actions, policies.whitened(raw, actions), 0.0)
        np.testing.assert_allclose(advantages, case["advantages"], **TOLERANCE)

        def losses(new_logps, new_values):
            clip = setting("cliprange")
            of_policy = policies.policy_loss(new_logps, logps, advantages, jnp.asarray(actions, jnp.float32), clip)
            of_value = policies.value_loss(
                new_values, values, raw + values, jnp.asarray(valued, jnp.float32), setting("cliprange_value")
            )
            loss = divide(of_policy.loss) + setting("vf_coef") * divide(of_value.loss)
            return loss, (divide(of_policy.loss), divide(of_value.loss), of_policy.clipped)

        given = jnp.asarray(case["new_logprobs"]), jnp.asarray(case["new_values"])
        (loss, made), grads = jax.value_and_grad(losses, argnums=(0, 1), has_aux=True)(*given)
        np.testing.assert_allclose(loss, case["loss"], **TOLERANCE)
        for value, name in zip(made, ("policy_loss", "value_loss", "policy_clip_fraction")):
            np.testing.assert_allclose(value, case[name], **TOLERANCE)
        for grad, name in zip(grads, ("new_logprobs", "new_values")):
            np.testing.assert_allclose(grad, case[f"grad_{name}"], **TOLERANCE)


def test_a_student_and_its_teacher():
    for _, case in cases("distill"):
        counts, labels = case["labels"] != -100, np.where(case["labels"] != -100, case["labels"], 0)
        T, alpha = float(case["temperature"]), float(case["alpha"])
        teacher = jnp.asarray(case["teacher_logits"])
        mean = lambda losses: jnp.sum(losses * counts) / counts.sum()

        def loss(student):
            ce = mean(-jnp.take_along_axis(jax.nn.log_softmax(student), labels[:, None], axis=1)[:, 0])
            kl = mean(logits.softened_kl(student, teacher, T))
            return alpha * ce + (1 - alpha) * T**2 * kl, (ce, kl)

        student = jnp.asarray(case["student_logits"])
        (value, (ce, kl)), grad = jax.value_and_grad(loss, has_aux=True)(student)
        for found, name in ((value, "loss"), (ce, "ce"), (kl, "kl"), (grad, "grad_student")):
            np.testing.assert_allclose(found, case[name], **TOLERANCE)
        for name in case:
            if name.startswith("gjsd_beta"):
                beta = float(name.removeprefix("gjsd_beta"))
                np.testing.assert_allclose(
                    mean(logits.generalized_jsd(student, teacher, beta, T)), case[name], **TOLERANCE
                )


# ---------------------------------------------------------------------------------------------------------------------
# Without golden files


def answers(seed, count=6):
    rng = np.random.default_rng(seed)
    logps = lambda: jnp.asarray(-rng.uniform(1, 30, count), jnp.float32)
    return Answers(logps(), logps(), jnp.asarray(rng.integers(2, 20, count), jnp.float32))


def test_simpo_reads_means_and_a_margin():
    chosen, rejected, how = answers(0), answers(1), Preference(2.0, margin=0.5)
    difference = np.asarray(2.0 * (chosen.policy / chosen.lengths - rejected.policy / rejected.lengths) - 0.5)
    np.testing.assert_allclose(preferences.simpo(chosen, rejected, how), np.log1p(np.exp(-difference)), rtol=1e-5)
    moved = chosen._replace(reference=chosen.reference + 3)
    for name in preferences.LOSSES:
        loss = lambda chosen: np.asarray(preferences.LOSSES[name](chosen, rejected, how))
        assert np.array_equal(loss(chosen), loss(moved)) == (name in preferences.WITHOUT_REFERENCE)


def test_smoothed_labels_are_a_mixture_of_both_ways_around():
    chosen, rejected = answers(0), answers(1)
    smoothed = preferences.sigmoid(chosen, rejected, Preference(0.1, 0.3))
    one, other = (preferences.sigmoid(*pair, Preference(0.1)) for pair in ((chosen, rejected), (rejected, chosen)))
    np.testing.assert_allclose(smoothed, 0.7 * one + 0.3 * other, rtol=1e-5)
    # Of labels of which so many are wrong, the robust loss is the plain one on average.
    robust = [preferences.robust(*pair, Preference(0.1, 0.3)) for pair in ((chosen, rejected), (rejected, chosen))]
    np.testing.assert_allclose(0.7 * robust[0] + 0.3 * robust[1], one, rtol=1e-4)


def test_kto_and_the_quality_loss():
    made, how = answers(0), Preference(0.1)
    desired = jnp.asarray([True, False, True, True, False, False])
    z = preferences.reference_point(answers(2), how)
    assert z == pytest.approx(max(0.0, 0.1 * float(np.mean(answers(2).gain))))
    losses = preferences.kto(made, desired, jnp.float32(0.2), how, (1.0, 1.5))
    rewards = 0.1 * np.asarray(made.gain) - 0.2
    value = lambda x: 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(losses, np.where(desired, 1 - value(rewards), 1.5 * (1 - value(-rewards))), rtol=1e-5)
    assert not jax.grad(lambda z: preferences.kto(made, desired, z, how, (1.0, 1.0)).sum())(0.2)
    quality = preferences.quality(answers(0), answers(1), 0.2, how)
    other = 0.1 * np.asarray(answers(1).gain) - 0.2
    np.testing.assert_allclose(quality, np.log1p(np.exp(-rewards)) + np.log1p(np.exp(other)), rtol=1e-5)


def test_advantages_are_sums_of_discounted_errors():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    gamma, decay = 0.9, 0.8
    made = policies.generalized_advantages(jnp.asarray(rewards), jnp.asarray(values), gamma, decay)
    following = np.pad(values[:, 1:], ((0, 0), (0, 1)))
    errors = rewards + gamma * following - values
    for t in range(7):
        expected = sum((gamma * decay) ** (s - t) * errors[:, s] for s in range(t, 7))
        np.testing.assert_allclose(made[:, t], expected, rtol=1e-4, atol=1e-5)


def test_a_group_is_compared_with_itself():
    rewards = jnp.asarray([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    made = np.asarray(policies.group_advantages(rewards))
    np.testing.assert_allclose(
        made[0], np.asarray([1, -1, -1, 1]) * 0.5 / (np.std([1, 0, 0, 1], ddof=1) + 1e-4), rtol=1e-5
    )
    assert not made[1].any()
    np.testing.assert_allclose(policies.group_advantages(rewards, scale=False)[0], [0.5, -0.5, -0.5, 0.5])


def test_a_ratio_may_rise_farther_than_it_falls():
    before, weights = jnp.zeros((1, 4)), jnp.asarray([[1.0, 1.0, 1.0, 0.0]])
    logps = jnp.log(jnp.asarray([[1.25, 1.4, 0.5, 9.0]]))
    made = policies.policy_loss(logps, before, jnp.ones((1, 4)), weights, low=0.2, high=0.3)
    total, weight = made.loss
    assert float(total) == pytest.approx(-(1.25 + 1.3 + 0.5)) and weight == 3
    assert float(made.clipped) == pytest.approx(1 / 3)
    grad = jax.grad(lambda x: policies.policy_loss(x, before, jnp.ones((1, 4)), weights, 0.2, 0.3).loss[0])(logps)
    assert grad[0, 1] == 0 and grad[0, 3] == 0 and grad[0, 0] < 0


def test_the_divergence_of_two_distributions_vanishes_where_they_are_equal():
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 9)), jnp.float32)
    for beta in (0, 0.3, 1):
        assert np.abs(logits.generalized_jsd(x, x, beta)).max() < 1e-6
        assert (logits.generalized_jsd(x, y, beta) > 0.01).all()
    np.testing.assert_allclose(logits.generalized_jsd(x, y, 0), logits.softened_kl(x, y), rtol=1e-5)
    near = policies.kl(jnp.float32(-1.0), jnp.float32(-1.1))
    assert 0 < near < 0.01 and policies.kl(jnp.float32(-1.0), jnp.float32(-1.1), "k1") == pytest.approx(0.1, abs=1e-6)
