"""An actor-critic whose critic sees more than its actor: things known in meta-training alone."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import Tensor, nn


class AsymmetricActorCritic(ActorCriticPolicy):
    """stable-baselines3's `MlpPolicy`, with an actor that is blind to the end of the observations.

    A critic serves learning alone, so that it may use what the actor will not have; see L. Pinto et al., Asymmetric
    Actor Critic for Image-Based Robot Learning, RSS 2018.

    Args:
        privileged: how many of an observation's last entries the actor does not see.
    """

    def __init__(self, *arguments: Any, privileged: int = 0, **named: Any) -> None:
        self._privileged = privileged
        super().__init__(*arguments, **named)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _Extractor(  # type: ignore[assignment]
            self.features_dim - self._privileged, self.features_dim, self.net_arch, self.activation_fn
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "privileged": self._privileged}


class _Extractor(nn.Module):
    """Both networks up to their last layers, as stable-baselines3 names them."""

    def __init__(self, actor: int, critic: int, widths: Any, activation: type[nn.Module]) -> None:
        super().__init__()
        pi, vf = (widths["pi"], widths["vf"]) if isinstance(widths, dict) else (widths, widths)
        policy = MlpExtractor(actor, {"pi": pi, "vf": []}, activation, device="cpu")
        value = MlpExtractor(critic, {"pi": [], "vf": vf}, activation, device="cpu")
        self._actor = actor
        self.policy_net, self.value_net = policy.policy_net, value.value_net
        self.latent_dim_pi, self.latent_dim_vf = policy.latent_dim_pi, value.latent_dim_vf

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        result: Tensor = self.policy_net(features[:, : self._actor])
        return result

    def forward_critic(self, features: Tensor) -> Tensor:
        result: Tensor = self.value_net(features)
        return result
