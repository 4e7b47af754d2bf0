"""MAAC's networks and updates by its authors' classes, from a clone of their repository:

git clone https://github.com/shariqiqbal2810/MAAC && git -C MAAC checkout 6174a01
MAAC_REPOSITORY=MAAC pytest tests/methods/test_maac_repository.py
"""

import importlib
import os
import sys

import pytest
import torch
from test_maac import NETS, maac, random_batch, seeded, setting

REPOSITORY = os.environ.get("MAAC_REPOSITORY", "")
pytestmark = pytest.mark.skipif(
    not REPOSITORY, reason="MAAC_REPOSITORY names no clone of github.com/shariqiqbal2810/MAAC"
)
# What the authors' form is called here. Their entropy coefficient is 1 / reward_scale.
AS_THEIRS = "--no-discount-entropy --entropy-coef .04 --polyak .1 --learning-rate 1e-3"


@pytest.fixture
def theirs(monkeypatch):
    """Import one of their modules; float64, and clip_grad_norm by its present name."""
    monkeypatch.syspath_prepend(REPOSITORY)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm", torch.nn.utils.clip_grad_norm_)
    torch.set_default_dtype(torch.float64)
    yield importlib.import_module
    torch.set_default_dtype(torch.float32)
    for name in [x for x in sys.modules if x.split(".")[0] in ("utils", "algorithms")]:
        del sys.modules[name]


def linear_pairs(layer, mine, s: int):
    """Their nn.Linear and our parameter set s, as pairs of tensors of one shape."""
    return [(layer.weight, mine.weight[s].T), (layer.bias, mine.bias[s])]


def actor_pairs(policies, actor):
    pairs = []
    for s, policy in enumerate(policies):
        layers = (policy.fc1, actor.first), (policy.fc2, actor.second), (policy.fc3, actor.out)
        for layer, mine in layers:
            pairs += linear_pairs(layer, mine, s)
    return pairs


def critic_pairs(critic, mine):
    pairs = []
    for s in range(critic.nagents):
        layers = (
            (critic.critic_encoders[s].enc_fc1, mine.action_encoder),
            (critic.state_encoders[s].s_enc_fc1, mine.state_encoder),
            (critic.critics[s].critic_fc1, mine.first),
            (critic.critics[s].critic_fc2, mine.out),
        )
        for layer, own in layers:
            pairs += linear_pairs(layer, own, s)
    D = mine.key.weight.shape[0] // mine.heads
    for h in range(mine.heads):
        part = slice(h * D, h * D + D)
        pairs += [
            (critic.selector_extractors[h].weight, mine.query.weight[part]),
            (critic.key_extractors[h].weight, mine.key.weight[part]),
            (critic.value_extractors[h][0].weight, mine.value.weight[part]),
            (critic.value_extractors[h][0].bias, mine.value.bias[part]),
        ]
    return pairs


def all_pairs(learner, agent):
    """Their tensor and ours for each weight, by our names of the four networks."""
    return {
        "actor": actor_pairs(learner.policies, agent.actor),
        "critic": critic_pairs(learner.critic, agent.critic),
        "target_actor": actor_pairs(learner.target_policies, agent.target_actor),
        "target_critic": critic_pairs(learner.target_critic, agent.target_critic),
    }


class Log:
    """Takes the place of their tensorboardX writer."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, step):
        self.scalars[name] = float(torch.as_tensor(value).detach())

    def add_scalars(self, name, values, step):
        pass


@pytest.fixture
def pair(theirs):
    """(our setting, their learner with our weights)"""
    s = setting("per agent", AS_THEIRS)
    args, N, O = s.args, s.game.num_agents, s.agent.actor.norm.mean.shape[1]
    learner = theirs("algorithms.attention_sac").AttentionSAC(
        [{"num_in_pol": O, "num_out_pol": 5}] * N,
        [(O, 5)] * N,
        gamma=args.gamma,
        tau=args.polyak,
        pi_lr=args.learning_rate,
        q_lr=args.learning_rate,
        reward_scale=1 / args.entropy_coef,
        pol_hidden_dim=args.hidden_size,
        critic_hidden_dim=args.hidden_size,
        attend_heads=args.heads,
    )
    with torch.no_grad():
        for pairs in all_pairs(learner, s.agent).values():
            for other, mine in pairs:
                other.copy_(mine)
    return s, learner


def rows(view, actions):
    """Their critic's input: for each agent its observations and its actions, one-hot."""
    one_hot = torch.eye(5)[actions]
    return [(view.obs[:, i], one_hot[:, i]) for i in range(view.obs.shape[1])]


def test_logits_and_q_are_those_of_their_networks(pair):
    s, learner = pair
    batch = random_batch(s, M=32)
    logits = s.agent.actor(batch.view)
    q, _ = s.agent.critic(batch.view, batch.actions)
    expected = learner.critic(rows(batch.view, batch.actions), return_all_q=True)
    for i, policy in enumerate(learner.policies):
        _, probs = policy(batch.view.obs[:, i], return_all_probs=True)
        assert torch.allclose(logits[:, i].softmax(-1), probs, rtol=0, atol=1e-9)
        assert torch.allclose(q[:, i], expected[i][1], rtol=0, atol=1e-9)
    assert q.std() > 0.1 and logits.std() > 0.1


def test_updates_are_theirs(pair, theirs, monkeypatch):
    """The critic's loss and all weights, over three updates with actions drawn by one generator."""
    s, learner = pair
    drawn = []
    categorical = "utils.policies.categorical_sample"
    monkeypatch.setattr(categorical, lambda probs, use_cuda: drawn.pop(0))
    before = {
        net: [mine.clone() for _, mine in x] for net, x in all_pairs(learner, s.agent).items()
    }

    for k in range(3):
        batch, log = random_batch(s, M=32, seed=k), Log()
        rng = seeded(k)
        found = maac.update_critic(s.args, s.agent, batch, rng)
        found |= maac.update_actors(s.args, s.agent, batch, rng)
        s.agent.follow()
        sample = (
            list(batch.view.obs.unbind(1)),
            list(torch.eye(5)[batch.actions].unbind(1)),
            list(batch.rewards.unbind(1)),
            list(batch.next_view.obs.unbind(1)),
            [batch.terminated.double()] * s.game.num_agents,
        )
        rng = seeded(k)
        for update, policies, obs in (
            (learner.update_critic, learner.target_policies, sample[3]),
            (learner.update_policies, learner.policies, sample[0]),
        ):
            noise = torch.empty(32, len(obs), 5).exponential_(generator=rng)
            for i, policy in enumerate(policies):
                logits = theirs("utils.policies").BasePolicy.forward(policy, obs[i])
                a = (logits.log_softmax(-1) - noise[:, i].log()).argmax(-1)
                drawn.append((a[:, None], torch.eye(5)[a]))
            update(sample, logger=log)
        learner.update_all_targets()
        assert not drawn
        assert found["critic_loss"] == pytest.approx(log.scalars["losses/q_loss"], rel=1e-9)
    for net, pairs in all_pairs(learner, s.agent).items():
        worst = max(float((other - mine).abs().max()) for other, mine in pairs)
        moved = max(float((b - mine).abs().max()) for b, (_, mine) in zip(before[net], pairs))
        assert worst < 1e-9 < 1e-4 < moved, (net, worst, moved)
    assert set(before) == set(NETS)
