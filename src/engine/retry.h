/*-------------------------------------------------------------------------
 *
 * retry.h
 *		How long to wait before the next try.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_ENGINE_RETRY_H
#define AGENTVM_ENGINE_RETRY_H

#include "postgres.h"

/*
 * Milliseconds to wait before try number "retries" (1, 2, ...): least(cap, base
 * * 2^(retries - 1)) * (1 +- jitter), with base 1 s and jitter 0.5, as AWS's SDK
 * guides advise; the jitter keeps many sessions from trying in step.
 */
extern int retry_delay_ms(int retries, int cap_ms);

#define RETRY_CAP_LAUNCH_MS (60 * 1000)
#define RETRY_CAP_TERMINATE_MS (300 * 1000)

#endif /* AGENTVM_ENGINE_RETRY_H */
