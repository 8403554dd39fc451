"""Every bound of the system, in one place.

`docs/limits.md` is the same as a table, with the error that each gives; a test compares the two.
"""

METRIC_CODE_PATTERN = r"[a-zA-Z0-9_.:-]{1,64}"
METRIC_CODE_BYTES_MAX = 64
DIMENSIONS_MAX = 8  # per metric
DIMENSION_VALUES_MAX = 1_000  # declared per dimension
DIMENSION_COMBINATIONS_MAX = 10_000  # kept as cells per account, metric and day
THRESHOLDS_MAX = 8  # per metric
THRESHOLD_CODE_BYTES_MAX = 64
TIME_ZONE_BYTES_MAX = 128
DESCRIPTION_BYTES_MAX = 1_024

PROPERTIES_BYTES_MAX = 64 * 1024  # per event, encoded
PROPERTY_KEY_BYTES_MAX = 128
PROPERTY_VALUE_BYTES_MAX = 1_024
EVENT_ID_BYTES_MAX = 256  # encoded, with its type tag
VALUE_TEXT_BYTES_MAX = 1_024  # a COUNT_UNIQUE STRING value, encoded, with its tag

PARTITIONS_MAX = 256  # of a cluster
REPLICAS_MAX = 7  # of a partition
REQUEST_EVENTS_MAX = 100_000
REQUEST_BYTES_MAX = 16 * 1024 * 1024
CHUNK_METRICS_MAX = 1_024  # distinct metric codes in one chunk
FRAME_BYTES_MAX = REQUEST_BYTES_MAX + 64 * 1024
APPEND_BYTES_MAX = 32 * 1024 * 1024  # one partition's payload from a gateway
APPEND_EVENTS_MAX = 400_000
APPEND_CHUNKS_MAX = 8_192

ACCOUNT_ID_MAX = 2**64 - 1
VALUE_MIN = -(2**63)
VALUE_MAX = 2**63 - 1
TIME_FUTURE_NS_MAX = 3_600 * 10**9  # beyond the leader's clock

CHUNK_RETRY_NS_MAX = 15 * 60 * 10**9  # how long a chunk may be retried under its identity
PRODUCER_RETENTION_NS = 20 * 60 * 10**9  # how long a partition remembers a chunk; longer than that
PRODUCER_WINDOW = 1_024  # sequences of a producer that a partition remembers
DEDUP_WINDOW_NS = 35 * 24 * 3_600 * 10**9  # default time for which event ids are remembered

PAGE_EVENTS_MAX = 10_000
QUERY_BUCKETS_MAX = 50_000
QUERY_ROWS_MAX = 100_000

SUBSCRIPTION_ACCOUNTS_MAX = 1_000  # that a subscriber or a webhook names
SUBSCRIPTION_METRICS_MAX = 100  # likewise
ALERTS_WAIT_MS_MAX = 30_000  # for which a fetch of alerts may be held
WEBHOOKS_MAX = 1_000  # of a cluster
WEBHOOK_URL_BYTES_MAX = 2_048
WEBHOOK_PENDING_MAX = 1_000  # deliveries of a webhook that are tried again; more wait in the store
WEBHOOK_DEAD_LETTERS_MAX = 1_000  # of a webhook; it is paused until they are looked at
WEBHOOK_RETRY_NS_MAX = 72 * 3_600 * 10**9  # from a delivery's first attempt to its last

SCHEMA_BYTES_MAX = 1024 * 1024  # a metric's schema, encoded; it must fit into one etcd request
THRESHOLD_VALUE_MAX = 2**63 - 1
GRACE_SECONDS_MAX = 10 * 366 * 86_400  # ten years
RETAIN_RAW_DAYS_MAX = 36_600  # a hundred years
ERROR_MESSAGE_BYTES_MAX = 4_096  # longer ones are cut

HANDSHAKE_BYTES_MAX = 64 * 1024  # body of a frame before the handshake, and of control frames after it
CALL_BYTES_MAX = 4 * 1024 * 1024  # body of a CALL frame
APPEND_FRAME_BYTES_MAX = APPEND_BYTES_MAX + 64 * 1024  # body of an APPEND frame
REPLICATE_FRAME_BYTES_MAX = (
    APPEND_BYTES_MAX + 8 * 1024 * 1024
)  # body of a REPLICATE frame: the largest record fits

COORDINATOR_KEY_BYTES_MAX = 1_024
COORDINATOR_VALUE_BYTES_MAX = SCHEMA_BYTES_MAX + 64 * 1024
COORDINATOR_OPERATIONS_MAX = 128  # in one transaction, as in etcd
COORDINATOR_STATE_BYTES_MAX = 16 * 1024 * 1024  # of an embedded coordinator: all of it fits into one frame
COORDINATOR_LEASES_MAX = 10_000
COORDINATOR_HISTORY_EVENTS_MAX = 4_096  # kept for watchers that are behind; older ones must list again
COORDINATOR_LEASE_SECONDS_MAX = 86_400
