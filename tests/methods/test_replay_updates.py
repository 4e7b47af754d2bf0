"""What the losses of an update are given, in all scripts that learn from a replay: each gradient
step its own minibatch, the present graph and networks, and the parts of the minibatch where they
belong. The losses themselves are tested where their equations are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from battle_tools import elsewhere  # noqa: F401
from battle_tools import run as run_in_battles
from particle_tools import EPC, MAAC, MADDPG, MRA, script
from particle_tools import run as run_in_particles

STEPS = 3  # gradient steps of an update
BATTLES = ["mipi_refil_smac", "baselines.refil_smac", "baselines.collaq_smac"]
PARTICLES = [MRA, MADDPG, EPC, MAAC]


def watch(monkeypatch, owner, name, seen):
    """Append to seen (name, arguments, result) of each call of owner.name."""
    real = getattr(owner, name)

    def watched(*args):
        result = real(*args)
        seen.append((name, args, result))
        return result

    monkeypatch.setattr(owner, name, watched)


@pytest.mark.parametrize("name", BATTLES + PARTICLES)
def test_each_gradient_step_has_a_minibatch_of_its_own(name, monkeypatch):
    module, seen = script(name), []
    loss = "update_critic" if name == MAAC else "critic_loss"
    watch(monkeypatch, module.ReplayBuffer, "sample", seen)
    watch(monkeypatch, module, "update", seen)
    watch(monkeypatch, module, loss, seen)
    if name in BATTLES:
        run_in_battles(module, Path("run"), 64, "--updates-per-iteration", STEPS)
    else:
        flag = "--num-updates" if name == MAAC else "--inner-steps"
        run_in_particles(name, Path("run"), 200, flag, STEPS)
    drawn = [result for what, _, result in seen if what == "sample"]
    used = [args[2] for what, args, _ in seen if what == loss]
    updates = sum(what == "update" for what, *_ in seen)
    assert updates and len(used) == updates * STEPS
    order = [next(k for k, batch in enumerate(drawn) if batch is one) for one in used]
    assert order == sorted(set(order))  # none twice
    if name != MRA:  # psi and xi draw further ones
        assert order == list(range(len(drawn)))


@pytest.mark.parametrize(
    ("name", "flags"), [(MRA, ""), (MRA, "--phi-gradient both"), (MADDPG, ""), (EPC, "")]
)
def test_what_losses_of_particle_scripts_are_given(name, flags, monkeypatch):
    """Q' reads the graph of o', the actor's loss the graph of o, with its gradient where theta
    moves the graph, and the critic that has just taken a step, not its slow copy."""
    module, seen = script(name), []

    def watched(args, agent, batch, g, next_g, rng):
        with torch.no_grad():
            assert torch.equal(g, agent.attention(batch.view)) and not g.requires_grad
            assert torch.equal(next_g, agent.attention(batch.next_view))
            assert not torch.equal(g, next_g) and not next_g.requires_grad
        seen.append([p.detach().clone() for p in agent.critic.parameters()])
        return critic_loss(args, agent, batch, g, next_g, rng)

    def actors(args, agent, batch, g, rng):
        moved = [p.detach().clone() for p in agent.critic.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(moved, seen[-1], strict=True))
        assert g.requires_grad == (flags != "--phi-gradient both")  # there information moves phi
        seen.append(agent.critic)
        return actor_loss(args, agent, batch, g, rng)

    critic_loss, actor_loss = module.critic_loss, module.actor_loss
    agents = []
    real = module.Agent.follow

    def follow(agent):
        agents.append(agent)
        return real(agent)

    monkeypatch.setattr(module, "critic_loss", watched)
    monkeypatch.setattr(module, "actor_loss", actors)
    monkeypatch.setattr(module.Agent, "follow", follow)
    run_in_particles(name, Path("run"), 200, "--inner-steps", STEPS, *flags.split())
    assert agents and len(seen) == 2 * STEPS * len(agents)
    critics = seen[1::2]
    for k, agent in enumerate(agents):
        assert all(critic is agent.critic for critic in critics[k * STEPS : (k + 1) * STEPS])
