"""REFIL's loss in its plainest form: all 16 slots and padded time, with a loop over time steps,
masks and hypernetworks. The batched loss of baselines/refil_smac.py is tested and timed against it.

    episodes = episodes_of(s, seed=3, size=6)      the minibatch that s.buffer.sample() draws
    loss = Plain(s.args, s.agent).loss(episodes, groups)

`Folded` is laid out like the authors' code: time is folded into the batch, the three masks are
three batches, and only the GRU runs step by step.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, SLOTS = 8, 16


class Episodes(NamedTuple):
    """B episodes of battles with all 16 slots (8 agents, 8 enemies), padded to the longest."""

    entities: Tensor  # (T + 1, B, 16, D): features, and last actions in the slots of agents
    unseen: Tensor  # (T + 1, B, 8, 16) bool: the agent does not see the unit
    empty: Tensor  # (B, 16) bool: the slot has no unit
    avail_actions: Tensor  # (T + 1, B, 8, actions) bool
    actions: Tensor  # (T, B, 8) int64
    rewards: Tensor  # (T, B)
    terminated: Tensor  # (T, B) bool; false if the episode was truncated at the time limit
    length: Tensor  # (B,) steps of the episode

    @property
    def played(self) -> Tensor:
        """(T, B) bool: steps that are not padding."""
        return torch.arange(len(self.rewards))[:, None] < self.length


def episodes_of(s: Any, seed: int, size: int) -> Episodes:
    """The episodes that s.buffer.sample() draws with a generator of this seed, with all slots."""
    buffer = s.buffer
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(buffer.size, generator=rng)[:size]
    length = buffer.fixed["length"][chosen]
    chosen = chosen[torch.sort(length, descending=True, stable=True).indices]
    length = buffer.fixed["length"][chosen]
    T, n = int(length.max()), buffer.battles.family.n_actions
    entities, unseen, avail = [], [], []
    # The buffer is not defined after an episode's end: padding repeats the last moment and step.
    moment = torch.minimum(torch.arange(T + 1)[:, None], length)  # (T + 1, B)
    step = torch.minimum(torch.arange(T)[:, None], length - 1)  # (T, B)
    actions = buffer.steps["actions"][chosen, step].long()  # (T, B, 8)
    for t in range(T + 1):
        snapshot = {name: x[chosen, moment[t]] for name, x in buffer.states.items()}
        snapshot |= {name: buffer.fixed[name][chosen] for name in buffer.battles.fixed}
        obs = buffer.battles.observe(buffer.battles.snapshot._replace(**snapshot))
        last_actions = torch.zeros(size, SLOTS, n)
        if t:
            last_actions[:, :SIDE] = torch.eye(n)[actions[t - 1]]
        entities.append(torch.cat((obs.entities, last_actions), dim=-1))
        unseen.append(obs.obs_mask[:, :SIDE])
        avail.append(obs.avail)
    return Episodes(
        entities=torch.stack(entities),
        unseen=torch.stack(unseen),
        empty=obs.entity_mask,
        avail_actions=torch.stack(avail),
        actions=actions,
        rewards=buffer.steps["rewards"][chosen, step],
        terminated=buffer.steps["terminated"][chosen, step],
        length=length,
    )


def all_slots(groups: Tensor, features: Any, size: int) -> Tensor:
    """Groups (M, S) of a minibatch's features as (B, 16); False in the slots it leaves out."""
    first, A = groups[: features.played.shape[1]], features.unseen.shape[1]
    full = torch.zeros(size, SLOTS, dtype=torch.bool)
    full[:, :A] = first[:, :A]
    full[:, SIDE : SIDE + A] = first[:, A:]
    return full


class Plain:
    """The loss of an agent of baselines/refil_smac.py, from its weights but without forward()."""

    def __init__(self, args: Any, agent: Any):
        self.args, self.agent = args, agent

    def attention(self, x: Tensor, query: Tensor, key_value: Tensor, mask: Tensor) -> Tensor:
        """Attention of 8 agents over 16 units x (B, 16, H): (B, 8, H); mask (B, 8, 16): unseen."""
        H, heads = x.shape[-1], self.args.heads

        def by_head(y: Tensor) -> Tensor:
            return y.unflatten(-1, (heads, -1)).transpose(1, 2)

        key, value = (x @ key_value).chunk(2, dim=-1)
        scores = by_head(x[:, :SIDE] @ query) @ by_head(key).transpose(-1, -2)
        scores = scores / math.sqrt(H // heads)
        weights = scores.masked_fill(mask[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ by_head(value)).transpose(1, 2).flatten(2)

    def utilities(self, net: nn.Module, episodes: Episodes, mask: Tensor) -> Tensor:
        """Utilities (T + 1, B, 8, actions) with units hidden by mask (T + 1, B, 8, 16)."""
        B, nobody = len(episodes.empty), episodes.empty[:, :SIDE, None]
        hidden, found = torch.zeros(B * SIDE, self.args.rnn_size), []
        for t in range(len(episodes.entities)):
            units = F.relu(net.embed(episodes.entities[t]))
            x = self.attention(units, net.attention.query[0], net.attention.key_value[0], mask[t])
            x = net.gru_input(net.project(x).masked_fill(nobody, 0.0))
            if self.args.own_beside:
                x = x + net.own(units[:, :SIDE])
            x = F.relu(x).flatten(0, 1)
            hidden = remember(net.gru, x, hidden)
            found.append(net.head(hidden).view(B, SIDE, -1).masked_fill(nobody, 0.0))
        return torch.stack(found)

    def hypernetwork(
        self, net: nn.Module, g: int, entities: Tensor, empty: Tensor, mask: Tensor
    ) -> Tensor:
        """Hypernetwork g of a mixer: (B, 8, E), from entities (B, 16, D) and mask (B, 8, 16)."""
        H, nobody = self.args.hidden_size, empty[:, :SIDE, None]
        rows = slice(g * H, (g + 1) * H)
        x = F.relu(F.linear(entities, net.embed.weight[rows], net.embed.bias[rows]))
        x = self.attention(x, net.attention.query[g], net.attention.key_value[g], mask)
        x = (x @ net.project[g] + net.project_bias[g]).masked_fill(nobody, 0.0)
        return (x @ net.out[g] + net.out_bias[g]).masked_fill(nobody, 0.0)

    def mix(
        self, net: nn.Module, q: Tensor, episodes: Any, t: int, groups: Tensor | None = None
    ) -> Tensor:
        """Q_tot (B,) at t of q (B, 8), or, with groups (B, 16), of q (B, 16): own, other group."""
        empty, entities = episodes.empty, episodes.entities[t]
        full = empty[:, :SIDE, None] | empty[:, None]
        masks = [full]
        if groups is not None:
            apart = groups[:, :SIDE, None] != groups[:, None]
            masks = [full | apart, full | ~apart]

        def hyper(g: int, mask: Tensor) -> Tensor:
            return self.hypernetwork(net, g, entities, empty, mask)

        w = torch.cat([hyper(0, mask) for mask in masks], dim=1)
        v = hyper(1, full).mean((1, 2))
        if self.args.mixer == "linear":
            gone = episodes.avail_actions[t, :, :, 0].repeat(1, len(masks))
            weights = w.mean(-1).masked_fill(gone, 0.0).softmax(-1)
            return (weights * q).sum(-1) + v
        w_final, b = hyper(2, full).mean(1), hyper(3, full).mean(1)
        x = F.elu((q[..., None] * w.softmax(-1)).sum(1) + b)
        return (x * w_final.softmax(-1)).sum(-1) + v

    def loss(self, episodes: Episodes, groups: Tensor | None) -> Tensor:
        """REFIL's loss with groups (B, 16), or AQMIX's with None: a scalar."""
        agent, args, masks = self.agent, self.args, [episodes.unseen]
        if groups is not None:
            apart = groups[:, :SIDE, None] != groups[:, None]
            masks += [episodes.unseen | apart, episodes.unseen | ~apart]
        q = [self.utilities(agent.utility, episodes, mask) for mask in masks]
        target_q = self.utilities(agent.target_utility, episodes, episodes.unseen)
        best = q[0].detach().masked_fill(~episodes.avail_actions, -math.inf).argmax(-1)
        chosen = [pick(x[:-1], episodes.actions) for x in q]
        td, imagined = [], []
        for t in range(len(episodes.rewards)):
            next_q = pick(target_q[t + 1], best[t + 1])
            later = self.mix(agent.target_mixer, next_q, episodes, t + 1)
            over = episodes.terminated[t]
            if args.timeout_terminates:
                over = over | (t + 1 == episodes.length)
            y = (episodes.rewards[t] + args.gamma * later * ~over).detach()
            td.append(self.mix(agent.mixer, chosen[0][t], episodes, t) - y)
            if groups is not None:
                both = torch.cat((chosen[1][t], chosen[2][t]), dim=-1)
                imagined.append(self.mix(agent.mixer, both, episodes, t, groups) - y)
        td_loss = mean_square(torch.stack(td), episodes.played)
        if groups is None:
            return td_loss
        weight = args.imagine_weight
        group_loss = mean_square(torch.stack(imagined), episodes.played)
        return (1 - weight) * td_loss + weight * group_loss


class Folded(Plain):
    """REFIL's loss with time folded into the batch; it needs groups."""

    def utilities(self, net: nn.Module, episodes: Episodes, mask: Tensor) -> Tensor:
        """Utilities (T + 1, V B, 8, actions) with V masks in one batch (T + 1, V B, 8, 16)."""
        views = mask.shape[1] // len(episodes.empty)
        nobody = episodes.empty.repeat(views, 1)[:, :SIDE, None]
        T, B = mask.shape[:2]
        units = F.relu(net.embed(episodes.entities.repeat(1, views, 1, 1)))  # (T + 1, V B, 16, H)
        query, key_value = net.attention.query[0], net.attention.key_value[0]
        x = self.attention(units.flatten(0, 1), query, key_value, mask.flatten(0, 1))
        x = net.gru_input(net.project(x).unflatten(0, (T, B)).masked_fill(nobody, 0.0))
        if self.args.own_beside:
            x = x + net.own(units[:, :, :SIDE])
        x = F.relu(x).flatten(1, 2)
        hidden, found = torch.zeros_like(x[0]), []
        for now in x:
            hidden = remember(net.gru, now, hidden)
            found.append(hidden)
        q = net.head(torch.stack(found)).view(T, B, SIDE, -1)
        return q.masked_fill(nobody, 0.0)

    def loss(self, episodes: Episodes, groups: Tensor) -> Tensor:
        """REFIL's loss with groups (B, 16): a scalar."""
        agent, args = self.agent, self.args
        T, B = episodes.rewards.shape
        apart = groups[:, :SIDE, None] != groups[:, None]
        unseen = episodes.unseen
        masks = torch.cat((unseen, unseen | apart, unseen | ~apart), dim=1)
        q = self.utilities(agent.utility, episodes, masks)
        with torch.no_grad():
            target_q = self.utilities(agent.target_utility, episodes, unseen)
            best = q[:, :B].masked_fill(~episodes.avail_actions, -1e9).argmax(-1)
            next_q = pick(target_q[1:], best[1:]).flatten(0, 1)
            later = fold(episodes, 1, T + 1)
            later = self.mix(agent.target_mixer, next_q, later, 0).view(T, B)
            over = episodes.terminated | (torch.arange(1, T + 1)[:, None] == episodes.length)
            y = episodes.rewards + args.gamma * later * ~over
        chosen = pick(q[:-1], episodes.actions.repeat(1, 3, 1))
        full_view, own_group, other_group = chosen.chunk(3, dim=1)
        both = torch.cat((own_group, other_group), dim=-1).flatten(0, 1)
        now = fold(episodes, 0, T)
        q_total = self.mix(agent.mixer, full_view.flatten(0, 1), now, 0).view(T, B)
        q_groups = self.mix(agent.mixer, both, now, 0, groups.repeat(T, 1)).view(T, B)
        td_loss = mean_square(q_total - y, episodes.played)
        group_loss = mean_square(q_groups - y, episodes.played)
        return (1 - args.imagine_weight) * td_loss + args.imagine_weight * group_loss


def fold(episodes: Episodes, first: int, last: int) -> SimpleNamespace:
    """Time steps first to last - 1 of B episodes as one time step of (last - first) B episodes."""
    return SimpleNamespace(
        entities=episodes.entities[first:last].flatten(0, 1)[None],
        avail_actions=episodes.avail_actions[first:last].flatten(0, 1)[None],
        empty=episodes.empty.repeat(last - first, 1),
    )


def remember(layer: nn.GRU | nn.Linear, x: Tensor, hidden: Tensor) -> Tensor:
    """The next hidden state of a one-layer GRU, or of the linear layer in its place (no memory)."""
    if isinstance(layer, nn.Linear):
        return F.relu(layer(x))
    weights = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)
    return torch.gru_cell(x, hidden, *weights)


def pick(q: Tensor, actions: Tensor) -> Tensor:
    """The values (...) of chosen actions (...) in q (..., actions)."""
    return q.gather(-1, actions[..., None])[..., 0]


def mean_square(errors: Tensor, played: Tensor) -> Tensor:
    """The mean square of errors (T, B) over the steps that were played (T, B)."""
    return (errors.square() * played).sum() / played.sum()
