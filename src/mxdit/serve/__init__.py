"""A video server: durable jobs, progress by step, cancelling. `app` is what answers, `dispatch` what works.

One process answers; each device has a worker process that holds the models, so that what kills a worker kills no server.
docs/serving.md is for users.
"""
