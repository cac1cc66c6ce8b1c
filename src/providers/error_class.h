/*-------------------------------------------------------------------------
 *
 * error_class.h
 *		The few ways in which a provider's answer can be bad.
 *
 * The engine decides by class alone what happens next; see engine/retry.h.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROVIDERS_ERROR_CLASS_H
#define AGENTVM_PROVIDERS_ERROR_CLASS_H

typedef enum ErrorClass
{
	CLASS_NONE = 0,
	CLASS_CREDENTIALS, /* refused: fail fast, one call only */
	CLASS_CAPACITY,	   /* no room: try the next market, then fail */
	CLASS_THROTTLED,   /* too many calls: slow this account down, try again */
	CLASS_QUOTA,	   /* the account's own limit: fail */
	CLASS_NOT_FOUND,   /* the VM is gone */
	CLASS_TRANSIENT,   /* may have happened or not: repeat the same step with the same token */
	CLASS_PERMANENT	   /* will never work: fail */
} ErrorClass;

#define NUM_ERROR_CLASSES (CLASS_PERMANENT + 1)

/* The class as it stands in events and views: "credentials", "capacity", ...; "none". */
extern const char *error_class_name(ErrorClass class);

#endif /* AGENTVM_PROVIDERS_ERROR_CLASS_H */
