/*-------------------------------------------------------------------------
 *
 * aws_login.h
 *		Whom AWS takes us for: access keys, assumed roles, the server's own machine.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROVIDERS_AWS_LOGIN_H
#define AGENTVM_PROVIDERS_AWS_LOGIN_H

#include "postgres.h"

#include "providers/provider.h"

/* Provider.login_needed, login_step and login_expired of the providers that are AWS. */
extern char *aws_login_needed(const LoginContext *context);
extern void aws_login_step(const LoginContext *context, const HttpReply *reply, SecretSet *kept,
						   LoginStep *step);
extern bool aws_login_expired(const HttpReply *reply);

/* Whether a text has the form of the ARN of an IAM role. */
extern bool aws_is_role_arn(const char *text);

#endif /* AGENTVM_PROVIDERS_AWS_LOGIN_H */
