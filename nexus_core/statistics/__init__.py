"""What routers do over many tokens: streamed moments, and the hooks that listen to a running model."""
