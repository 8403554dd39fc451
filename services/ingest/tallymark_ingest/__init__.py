"""The ingest gateway: splits chunks by partition, coalesces small requests, routes to leaders, returns receipts.

`serve` starts one. `gateway` is its pure core, `split` the kernels' face, `metrics_admin` the metric calls.
"""

from tallymark_ingest.gateway import GatewayConfig
from tallymark_ingest.server import GatewayServer, ServerConfig, serve

__all__ = ["GatewayConfig", "GatewayServer", "ServerConfig", "serve"]
