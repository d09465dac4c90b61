# The entry point of the service. `serve run serve/app.py` reads an existing file as YAML, whatever its name, and
# `serve run serve.app:app` imports it as Python: so every line below is both. It says what lora_diffusion/endpoint/app.yaml
# says, with comments; settings are in configs/serve_tiny.yaml; deploy/serve.yaml is for a cluster.
# ruff: noqa
# mypy: ignore-errors
# fmt: off
logging_config: {"enable_access_log": False, "log_level": "WARNING"}
controller_options: {"runtime_env": {"env_vars": {"RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "lora_diffusion.endpoint.logs.only_warnings", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "lora_diffusion.endpoint.logs.only_warnings"}}}
http_options: {"host": "127.0.0.1", "port": 8000}
applications: [{"name": "lora-diffusion", "route_prefix": "/", "import_path": "lora_diffusion.endpoint.graph:build", "runtime_env": {"env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}}, "args": {"config": "configs/serve_tiny.yaml"}}]
app: object = __import__("lora_diffusion.endpoint.graph", fromlist=["build"]).build
