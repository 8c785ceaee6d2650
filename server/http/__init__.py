"""The HTTP side: endpoints, accounts, middleware, and the OpenAPI and AsyncAPI documents."""
