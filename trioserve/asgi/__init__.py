"""The bridge to the app: finding it, its lifespan, its scope, and the exchange of messages with it."""
