"""Servers for the tests, on 127.0.0.1 in threads of the test's own process.

    with buckets.Buckets("bucket") as server:   S3, Google Cloud Storage and Azure Blob
        server.environment()                    what leads there; `server.s3()` for an S3Store
    with s3.moto("bucket") as url:              S3 as moto has it, for what ours may have got wrong
    with files.Files(folder) as server:         plain HTTP with ranges and an index page
    with hub.Hub({"me/ema": folder}) as server:
                                                what reading from the Hugging Face hub needs
    with faults.Proxy(server.url) as proxy:
        proxy.add(faults.Fault(status=503, count=2, method="PUT"))

Each has a `url`, and notes in `requests` what it was asked.
"""
