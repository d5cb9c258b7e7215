"""Training under the strategies of a run, as the paper does before it measures LLaVA."""
